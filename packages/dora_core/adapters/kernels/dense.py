"""Backward passes of small layers: all gradients from that of the effective weight, dy^T x [out, in]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dora_core.adapters.kernels.gradient_ops import transposed_product
from dora_core.adapters.kernels.projection import Stack
from dora_core.adapters.kernels.weight_ops import formed_weight, weight_gradients


def dense_gradients(
    x: Tensor, dys: Sequence[Tensor], stack: Stack, needs: Sequence[Sequence[bool]], need_x: bool
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Return the gradient of x [T, in] and, of each layer, those of bias, A, B and m, for dy [T, out] of each."""
    dx, grads = None, []
    for i, (p, dy, (need_bias, need_a, need_b, need_m)) in enumerate(zip(stack.projections, dys, needs, strict=True)):
        if need_x:
            formed = formed_weight(stack, i)
            dx = torch.mm(dy, formed) if dx is None else dx.addmm_(dy, formed)
        own: list[Tensor | None] = [dy.sum(0, dtype=torch.float32).to(p.bias.dtype) if need_bias else None] + [None] * 3
        if need_a or need_b or need_m:
            lora_A, lora_B = (stack.lora_A(i), stack.lora_B(i)) if p.rank else (None, None)
            gradient = transposed_product(dy, x, torch.float32)
            options = (p.settings.scale, p.settings.full_norm, stack.dtype)
            update, dm = weight_gradients(gradient, p.weight, lora_A, lora_B, p.magnitude, p.norm, *options)
            own[1] = transposed_product(lora_B, update, p.lora_A.dtype) if need_a else None
            own[2] = transposed_product(update.t(), lora_A.t(), p.lora_B.dtype) if need_b else None
            own[3] = dm if need_m else None
        grads.append(own)
    return dx, grads
