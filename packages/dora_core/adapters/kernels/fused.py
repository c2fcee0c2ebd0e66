"""Adapted linear products with the fused kernels: the same function as ``functional.adapted_linear``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_core.adapters.kernels.dense import dense_gradients
from dora_core.adapters.kernels.forms import backward_form, forward_form, is_dense, keeps_output, needs_base
from dora_core.adapters.kernels.gradient_ops import output_gradients, transposed_product
from dora_core.adapters.kernels.kept_outputs import Computed, compute_or_take
from dora_core.adapters.kernels.launch import cast
from dora_core.adapters.kernels.low_rank import (
    flat,
    give_gradients_of_a,
    gradient_of_hidden,
    hidden_of,
    masks_first,
    slices,
    source_of_a,
)
from dora_core.adapters.kernels.projection import Projection, Stack
from dora_core.adapters.kernels.token_ops import compose, masked
from dora_core.adapters.kernels.weight_ops import formed_weight

linear = torch._C._nn.linear
"""``F.linear`` itself, for which ZeRO-3 puts a slower one of its own."""
NUM_TRAINED = 4
"""Of a projection's tensors those that may have a gradient: bias, A, B and m."""
NUM_OTHERS = 5
"""Arguments of the function before them."""


def fused_linears(x: Tensor, layers: Sequence[Projection] | Stack, dropout: float = 0.0) -> tuple[Tensor, ...]:
    """Return the outputs [..., out] of LoRA or DoRA ``layers`` that share x [..., in], in x's type.

    The function of ``adapted_linear`` with its ``lowrank`` dropout, drawn here with probability ``dropout`` and one
    mask for all; a ``Stack`` of x's type keeps what several calls need. The two ways of computing an output, see
    ``choose_form``, have their own error for half types: ``composed`` rounds the base product once more; ``merged``
    rounds the weight without bias, together up to twice the error of one rounding of y. Kept for the backward pass
    beside x, or a drop(x) of their own in its place at large ranks: one [tokens, r] and, for the gradient of the
    magnitude, the output itself, which nobody may write to unseen by torch, or one [tokens, out]. A dropout mask is
    drawn again from its seed, a formed weight formed again. But x alone is kept in small layers whose norm is
    differentiated, which are ``dense``, see ``choose_dense``.
    """
    seed = torch.randint(2**31, (1,), device=x.device) if dropout > 0 else None
    stack = layers if isinstance(layers, Stack) else Stack(layers, x.dtype)
    projections = stack.projections
    if not torch.is_grad_enabled():
        source = source_of_a(x, stack, seed, dropout)
        return tuple(_forward(x, source, stack, [False] * len(projections), seed, dropout).outputs)
    tensors = [tensor for p in projections for tensor in (p.bias, p.lora_A, p.lora_B, p.magnitude)]
    if not torch.compiler.is_compiling():
        return _FusedLinears.apply(x, seed, dropout, stack, None, *tensors)
    tensors += [tensor for p in projections for tensor in (p.weight, p.norm)]
    return _FusedLinears.apply(x, seed, dropout, None, tuple(p.settings for p in projections), *tensors)


def _forward(
    x: Tensor,
    source: Tensor,
    stack: Stack,
    keeps: Sequence[bool],
    seed: Tensor | None,
    dropout: float,
    dense: bool = False,
) -> Computed:
    """Return outputs [..., out], what m needs of them where ``keeps``, and hidden, of ``source_of_a``."""
    dtype, projections = x.dtype, stack.projections
    forms = [forward_form(p, x, seed, each, dense) for p, each in zip(projections, keeps, strict=True)]
    hidden = hidden_of(flat(source), stack, seed, dropout) if "composed" in forms and not dense else None
    outputs, kept = [], []
    for i, (p, form, keep, low) in enumerate(zip(projections, forms, keeps, slices(hidden, stack), strict=True)):
        bias, base = cast(p.bias, dtype), None
        if form == "merged":
            y = linear(x, formed_weight(stack, i), bias)
        elif p.settings.untouched:  # the base layer's own kernel, so that the result is its result bit for bit
            y = linear(x, cast(p.weight, dtype), bias)
            if keep and bias is not None:
                base = linear(x, cast(p.weight, dtype))
        else:
            base = linear(x, cast(p.weight, dtype))
            factors = (low, stack.lora_B(i), p.magnitude, p.norm, bias, p.settings.scale)
            keeps_base = keep and needs_base(p, x)
            y = compose(base, *factors, over=not keeps_base)
            if not keeps_base:
                base = None
        outputs.append(y)
        kept.append((y if base is None else base) if keep else None)
    return Computed(outputs, kept, hidden)


class _FusedLinears(torch.autograd.Function):
    """y_i = g_i (x W_i^T + s_i drop(x) A_i^T B_i^T) + bias_i for x [..., in]."""

    @staticmethod
    def forward(ctx, x, seed, dropout, stack, settings, *tensors):
        # Parameters and norms live on anyway: saving them would cost activation checkpointing two calls for each.
        # Only while tracing, ``stack`` is None and they must be saved.
        ctx.known, saved = stack, tensors if stack is None else ()
        stack = stack or Stack(_projections(tensors, settings), x.dtype)
        projections = stack.projections
        needs = _needs(ctx, len(projections))
        trains = any([need[1] or need[2] or need[3] for need in needs])
        ctx.is_dense = dense = trains and seed is None and is_dense(x, projections)
        keeps = [not dense and keeps_output(p, need[3]) for p, need in zip(projections, needs, strict=True)]
        source = source_of_a(x, stack, seed, dropout)
        compute = partial(_forward, x, source, stack, keeps, seed, dropout, dense)
        if torch.compiler.is_compiling():  # a graph holds no state
            outputs, kept, hidden = compute()
        else:
            outputs, kept, hidden = compute_or_take(compute, stack.recomputation)
        ctx.kept_is_output = [y is each for y, each in zip(outputs, kept, strict=True)]
        keeps_x = trains or any(keeps)
        ctx.save_for_backward(source if keeps_x else None, seed, hidden if keeps_x else None, *kept, *saved)
        ctx.versions = None if saved else _versions(projections)
        ctx.options = (x.shape, dropout, settings, x.dtype)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        shape, dropout, settings, dtype = ctx.options
        source, seed, hidden, *rest = ctx.saved_tensors
        source = flat(source)
        kept = rest[: len(dys)]
        stack = ctx.known or Stack(_projections(rest[len(dys) :], settings), dtype)
        projections = stack.projections
        if ctx.known and ctx.versions != _versions(projections):
            raise RuntimeError(
                "A parameter of an adapted layer was modified in place between its forward and its backward pass. "
                "Step the optimizer after the backward pass."
            )
        needs = _needs(ctx, len(projections))
        need_x = ctx.needs_input_grad[0]
        if ctx.is_dense:
            dx, grads = dense_gradients(source, [cast(flat(dy), dtype) for dy in dys], stack, needs, need_x)
            return _gradients(ctx, dx, grads)
        merged = seed is None and backward_form(projections, math.prod(shape[:-1])) == "merged"
        if hidden is None and source is not None:
            hidden = hidden_of(source, stack, seed, dropout)
        wants_u = any([need[1] for need in needs]) or (need_x and not merged)
        is_masked = masks_first(stack, seed)
        factor_of_u = 1.0 / (1.0 - dropout) if is_masked else 1.0  # what of drop(x) is not in its source
        dx, us, grads, norm_parts = None, [], [], {}
        for i, (p, need, low) in enumerate(zip(projections, needs, slices(hidden, stack), strict=True)):
            dy = cast(flat(dys[i]), dtype)
            full_norm = p.settings.full_norm and p.rank > 0
            formed = formed_weight(stack, i) if (merged and need_x) or full_norm else None
            projected = torch.mm(formed, stack.lora_A(i).t()) if full_norm else None
            gained = p.magnitude is not None and not merged
            tensors = (dy, kept[i], low, p.lora_B, p.magnitude, p.norm, projected)
            options = (p.settings.scale, ctx.kept_is_output[i], gained)
            gained_dy, dB, dm, weighted_B = output_gradients(*tensors, *options)
            gained_dy = gained_dy if gained else dy
            if p.rank and wants_u:
                us.append(gradient_of_hidden(stack, i, gained_dy, p.settings.scale * factor_of_u, is_gained=not merged))
            if full_norm:
                norm_parts[i] = transposed_product(weighted_B, formed, torch.float32)
            if need_x:
                factors = (dy, formed) if merged else (gained_dy, cast(p.weight, dtype))
                dx = torch.mm(*factors) if dx is None else dx.addmm_(*factors)
            d_bias = dy.sum(0, dtype=torch.float32).to(p.bias.dtype) if need[0] else None
            grads.append([d_bias, None, dB if need[2] else None, dm if need[3] else None])
        if us:
            u = us[0] if len(us) == 1 else torch.cat(us, 1)
            if need_x and is_masked:
                dx = masked(torch.mm(u, stack.lora_A()), dx, seed, dropout, over=True)
            elif need_x and seed is not None:
                dx = compose(dx, u, stack.lora_A().t(), None, None, None, 1.0, seed, dropout, over=True)
            elif need_x and not merged:
                dx.addmm_(u, stack.lora_A())
            if any([need[1] for need in needs]):
                give_gradients_of_a(grads, norm_parts, projections, source, u, None if is_masked else seed, dropout)
        return _gradients(ctx, dx, grads)


def _gradients(ctx, dx: Tensor | None, grads: Sequence[Sequence[Tensor | None]]) -> tuple[Tensor | None, ...]:
    """Return what belongs to the arguments of the function, from the gradients of x and of each projection."""
    dx = None if dx is None else dx.view(ctx.options[0])
    frozen = () if ctx.known else (None,) * (2 * len(grads))
    return (dx, *[None] * (NUM_OTHERS - 1), *[grad for each in grads for grad in each], *frozen)


def _projections(tensors: Sequence[Tensor | None], settings: Sequence) -> list[Projection]:
    found = []
    for i, own in enumerate(settings):
        bias, lora_A, lora_B, magnitude = tensors[NUM_TRAINED * i :][:NUM_TRAINED]
        weight, norm = tensors[NUM_TRAINED * len(settings) + 2 * i :][:2]
        found.append(Projection(weight, bias, lora_A, lora_B, magnitude, norm, own))
    return found


def _needs(ctx, num_projections: int) -> list[Sequence[bool]]:
    """Of each projection, whether its bias, A, B and m need a gradient."""
    needs = ctx.needs_input_grad
    return [
        needs[start : start + NUM_TRAINED]
        for start in range(NUM_OTHERS, NUM_OTHERS + NUM_TRAINED * num_projections, NUM_TRAINED)
    ]


def _versions(projections: Sequence[Projection]) -> list[int]:
    trained = [tensor for p in projections for tensor in (p.lora_A, p.lora_B, p.magnitude)]
    return [tensor._version for tensor in trained if tensor is not None]
