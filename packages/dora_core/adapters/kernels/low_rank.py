"""The low-rank path of layers that share their input: drop(x) A^T, and what its gradient gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dora_core.adapters.kernels.gradient_ops import dropped_gradient, transposed_product
from dora_core.adapters.kernels.projection import Stack
from dora_core.adapters.kernels.token_ops import dropped_product, masked
from dora_core.adapters.kernels.weight_ops import effective_weight

MAX_MASKED_RANK = 64
"""Up to this sum of ranks the mask of dropout is drawn within the low-rank products. Above, drop(x) is formed for
cuBLAS, which is faster at large ranks by more than that takes: estimated from times at sums of 32 to 1152."""


def flat(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor [..., N], if any, as a matrix [T, N]."""
    return tensor if tensor is None or tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def masks_first(stack: Stack, seed: Tensor | None) -> bool:
    """Whether drop(x) is formed, instead of drawing dropout's mask within the products."""
    return seed is not None and sum(stack.ranks) > MAX_MASKED_RANK


def source_of_a(x: Tensor, stack: Stack, seed: Tensor | None, dropout: float) -> Tensor:
    """Return what A is multiplied by: x [..., in], or (1 - p) drop(x) [T, in] if it ``masks_first``."""
    return masked(flat(x), None, seed, dropout) if masks_first(stack, seed) else x


def hidden_of(source: Tensor, stack: Stack, seed: Tensor | None, dropout: float) -> Tensor | None:
    """Return drop(x) [A_1; A_2; ...]^T [T, sum of ranks], from ``source_of_a`` as a matrix."""
    if not stack.ranks:
        return None
    lora_A = stack.lora_A()
    if masks_first(stack, seed):
        return torch.addmm(stack.unused, source, lora_A.t(), beta=0, alpha=1.0 / (1.0 - dropout))
    return torch.mm(source, lora_A.t()) if seed is None else dropped_product(source, lora_A, seed, dropout)


def slices(hidden: Tensor | None, stack: Stack) -> Sequence[Tensor | None]:
    """Return the columns [T, r] of each layer, ``None`` for those without low-rank factors."""
    if hidden is None:
        return [None] * len(stack)
    if len(stack) == 1:
        return [hidden]
    parts = hidden.split_with_sizes(stack.ranks, 1)
    if len(parts) == len(stack):
        return parts
    some = iter(parts)
    return [next(some) if p.rank else None for p in stack.projections]


def gradient_of_hidden(stack: Stack, i: int, dy: Tensor, scale: float, *, is_gained: bool) -> Tensor:
    """Return ``scale`` (g dy) B [T, r] of a layer, from g dy or from dy itself: the gradient of what A gives."""
    p = stack.projections[i]
    if is_gained or p.magnitude is None:
        factor = stack.lora_B(i)
    else:
        factor = effective_weight(p.lora_B, None, None, p.magnitude, p.norm, 1.0, dy.dtype)
    return torch.addmm(stack.unused, dy, factor, beta=0, alpha=scale)


def give_gradients_of_a(grads, norm_parts, projections, source, u, seed, dropout) -> None:
    """Put u^T drop(x), and what ``norm_parts`` has beside it, where ``grads`` has room for the gradients of A."""
    ranked = [(i, p) for i, p in enumerate(projections) if p.rank]
    dtype = ranked[0][1].lora_A.dtype
    dA = transposed_product(u, source, dtype) if seed is None else dropped_gradient(source, u, seed, dropout)
    for (i, p), part in zip(ranked, dA.split_with_sizes([p.rank for _, p in ranked]), strict=True):
        grads[i][1] = (part + norm_parts[i] if i in norm_parts else part).to(p.lora_A.dtype)
