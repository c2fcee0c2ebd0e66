"""Operators of the backward pass: what one read of the output's gradient gives, and the gradient through dropout."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dora_core.adapters.kernels import gradient_kernels
from dora_core.adapters.kernels.launch import (
    MAX_KNOWN,
    NUM_PROGRAMS,
    Kernel,
    cdiv,
    contiguous,
    counters,
    dropout_threshold,
    empty,
    operand,
    rank_block,
    split,
    with_unit_stride,
)
from dora_core.adapters.kernels.library import register
from dora_core.adapters.kernels.token_ops import sum_parts

SMALL_RANK = 64
"""Up to this rank dB comes from the same read of dy as dm; above, a GEMM of its own is faster."""
MAX_PARTS = 32

_token_pass_kernel = Kernel(gradient_kernels.token_pass_kernel)
_finish_gradients_kernel = Kernel(gradient_kernels.finish_gradients_kernel)


def transposed_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return left^T right in ``dtype``, accumulated in fp32."""
    if dtype == left.dtype:
        return torch.mm(left.t(), right)
    if left.is_cuda:  # a GEMM in the operands' type with an fp32 result
        return torch.mm(left.t(), right, out_dtype=torch.float32).to(dtype)
    return left.to(dtype).t() @ right.to(dtype)


@lru_cache(MAX_KNOWN)
def _token_pass_plan(
    num_tokens: int,
    num_columns: int,
    rank: int,
    dot: bool,
    gained: bool,
    dropout: bool,
    finish: tuple,
    dtype: torch.dtype,
) -> tuple:
    column_blocks, rank_blocks = (
        cdiv(num_columns, 64),
        max(1, cdiv(rank, rank_block(rank))),
    )
    others = column_blocks * rank_blocks
    num_programs = min(max(NUM_PROGRAMS // 2, 2 * others), MAX_PARTS * others)
    parts, per_part = split(num_tokens, 64, others, num_programs)
    has_magnitude, kept_is_output, full_norm = finish or (False, False, False)
    constants = _token_pass_kernel.in_order(
        RANK=rank,
        RIGHT=rank > 0,
        DOT=dot,
        GAINED=gained,
        DROPOUT=dropout,
        FINISH=bool(finish),
        NUM_PARTS=parts if finish else 0,
        HAS_MAGNITUDE=has_magnitude,
        KEPT_IS_OUTPUT=kept_is_output,
        FULL_NORM=full_norm,
        BLOCK_T=64,
        BLOCK_N=64,
        BLOCK_R=rank_block(rank),
        STAGES=3,
        **operand(dtype),
    )
    return (column_blocks, parts, rank_blocks), per_part, constants


def _token_pass(
    x: Tensor,
    hidden: Tensor | None,
    kept: Tensor | None,
    factors: tuple[Tensor | None, ...] = (None, None, None, None),
    results: tuple[Tensor | None, ...] = (None, None, None, None),
    scale: float = 1.0,
    finish: tuple = (),
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch ``token_pass_kernel``; return the parts [p, ...] of drop(x)^T hidden and of sum_t x kept.

    ``factors`` are B, m, n and the weight product, ``results`` where g x, dB, dm and the weighted B go. ``finish`` says
    whether there is a magnitude, whether what was kept is the output and whether the norm is differentiated.
    """
    num_tokens, num_columns = x.shape
    hidden, rank, hidden_stride = with_unit_stride(hidden)
    flags = (kept is not None, results[0] is not None, seed is not None)
    grid, per_part, constants = _token_pass_plan(num_tokens, num_columns, rank, *flags, finish, x.dtype)
    right = None if hidden is None else empty(x, grid[1], num_columns, rank)
    dot = None if kept is None else empty(x, grid[1], num_columns)
    counter = counters(x.device, grid[0]) if finish else None
    numbers = (
        num_tokens,
        num_columns,
        per_part,
        float(scale),
        dropout_threshold(dropout),
        *x.stride(),
        hidden_stride,
    )
    tensors = (
        x,
        hidden,
        contiguous(kept),
        *factors,
        seed,
        results[0],
        right,
        dot,
        *results[1:],
        counter,
    )
    _token_pass_kernel(grid, tensors, numbers, constants)
    return right, dot


def _output_gradients(
    dy: Tensor,
    kept: Tensor | None,
    hidden: Tensor | None,
    lora_B: Tensor | None,
    magnitude: Tensor | None,
    norm: Tensor | None,
    weight_product: Tensor | None,
    scale: float,
    kept_is_output: bool,
    gained: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    results = _fake_output_gradients(
        dy,
        kept,
        hidden,
        lora_B,
        magnitude,
        norm,
        weight_product,
        scale,
        kept_is_output,
        gained,
    )
    rank = 0 if hidden is None else hidden.shape[1]
    factors = (contiguous(lora_B), magnitude, norm, contiguous(weight_product))
    finish = (magnitude is not None, kept_is_output, weight_product is not None)
    if rank <= SMALL_RANK:
        if any(result is not None for result in results):
            _token_pass(dy, hidden, kept, factors, results, scale, finish)
        return results
    right, dot = transposed_product(dy, hidden, torch.float32), None
    if gained or kept is not None:
        _, dot = _token_pass(dy, None, kept, factors, results)
    constants = _finish_gradients_kernel.in_order(
        NUM_PARTS=1,
        NUM_DOT_PARTS=0 if dot is None else dot.shape[0],
        RANK=rank,
        HAS_MAGNITUDE=finish[0],
        KEPT_IS_OUTPUT=kept_is_output,
        FULL_NORM=finish[2],
        BLOCK_M=8,
        BLOCK_R=rank_block(rank),
    )
    num_rows = dy.shape[1]
    tensors = (right, dot, *factors, *results[1:])
    _finish_gradients_kernel((cdiv(num_rows, 8), 1, 1), tensors, (num_rows, float(scale)), constants)
    return results


def _fake_output_gradients(
    dy,
    kept,
    hidden,
    lora_B,
    magnitude,
    norm,
    weight_product,
    scale,
    kept_is_output,
    gained,
):
    num_rows = dy.shape[1]
    return (
        torch.empty_like(dy, memory_format=torch.contiguous_format) if gained else None,
        None if hidden is None else empty(dy, num_rows, hidden.shape[1], dtype=lora_B.dtype),
        None if kept is None else empty(dy, num_rows),
        None if weight_product is None else empty(dy, num_rows, hidden.shape[1], dtype=dy.dtype),
    )


output_gradients = register(
    "output_gradients(Tensor dy, Tensor? kept, Tensor? hidden, Tensor? lora_B, Tensor? magnitude, Tensor? norm, "
    "Tensor? weight_product, float scale, bool kept_is_output, bool gained) -> (Tensor?, Tensor?, Tensor?, Tensor?)",
    _output_gradients,
    _fake_output_gradients,
)
"""What one read of dy [T, out] gives: g dy (``gained``), dB = s (g dy)^T hidden [out, r], dm [out], a weighted B.

``kept`` is the output y [T, out] without its bias (``kept_is_output``), whence dm = sum_t dy y / m, or the base product
x W^T, whence dm = sum_t dy (base + s hidden B^T) / n. ``weight_product`` = g V A^T [out, r] asks for the projection of
eq. 6, dL/dV += c V with c = -g dm / n: its part s c V A^T is added to dB, and the fourth result is s (c / g) B, whose
product with g V belongs to dA. Results that were not asked for are ``None``.
"""


def _dropped_gradient(x: Tensor, u: Tensor, seed: Tensor, dropout: float) -> Tensor:
    right, _ = _token_pass(x, u, None, seed=seed, dropout=dropout)
    return sum_parts(right, torch.float32, 1.0 / (1.0 - dropout)).t()


dropped_gradient = register(
    "dropped_gradient(Tensor x, Tensor u, Tensor seed, float dropout) -> Tensor",
    _dropped_gradient,
    lambda x, u, seed, dropout: empty(x, x.shape[1], u.shape[1]).t(),
)
"""u^T drop(x) [r, in] in fp32, with the mask of ``dropped_product``."""
