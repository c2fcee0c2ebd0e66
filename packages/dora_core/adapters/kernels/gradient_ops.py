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
    Launch,
    cdiv,
    contiguous,
    counters,
    dropout_threshold,
    dtype_of,
    empty,
    facts,
    operand,
    rank_block,
    scratch,
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
def _token_pass_launch(
    x: tuple,
    hidden: tuple,
    dtypes: tuple[torch.dtype | None, ...],
    dot: bool,
    gained: bool,
    finish: tuple[bool, bool, bool] | None,
    scale: float,
    dropout: float | None,
) -> tuple[int, int, Launch]:
    """Return the number of blocks of columns and of parts of tokens beside the launch.

    ``finish`` says whether there is a magnitude, whether what was kept is the output and whether the norm is
    differentiated; ``dtypes`` are those of what was kept, of B, m and the weight product.
    """
    ((num_tokens, num_columns), strides, dtype), (shape, (hidden_stride, _), _) = x, hidden
    rank, column_blocks = shape[1] if shape else 0, cdiv(num_columns, 64)
    num_programs = min(max(NUM_PROGRAMS // 2, 2 * column_blocks), MAX_PARTS * column_blocks)
    parts, per_part = split(num_tokens, 64, column_blocks, num_programs)
    has_magnitude, kept_is_output, full_norm = finish or (False, False, False)
    numbers = (num_tokens, num_columns, per_part, scale, dropout_threshold(dropout or 0.0), *strides, hidden_stride)
    launch = _token_pass_kernel.bind(
        (column_blocks, parts, 1),
        numbers,
        RANK=rank,
        RIGHT=rank > 0,
        DOT=dot,
        GAINED=gained,
        DROPOUT=dropout is not None,
        FINISH=finish is not None,
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
    return column_blocks, parts, launch


@lru_cache(MAX_KNOWN)
def _finish_gradients_launch(
    num_rows: int, rank: int, num_dot_parts: int, dtypes: tuple, finish: tuple[bool, bool, bool], scale: float
) -> Launch:
    has_magnitude, kept_is_output, full_norm = finish
    return _finish_gradients_kernel.bind(
        (cdiv(num_rows, 8), 1, 1),
        (num_rows, scale),
        NUM_PARTS=1,
        NUM_DOT_PARTS=num_dot_parts,
        RANK=rank,
        HAS_MAGNITUDE=has_magnitude,
        KEPT_IS_OUTPUT=kept_is_output,
        FULL_NORM=full_norm,
        BLOCK_M=8,
        BLOCK_R=rank_block(rank),
    )


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
    hidden, kept = with_unit_stride(hidden), contiguous(kept)
    factors = (contiguous(lora_B), magnitude, norm, contiguous(weight_product))
    results = _empty_results(dy, kept, hidden, lora_B, magnitude, weight_product, gained)
    gained_dy, dB, dm, weighted_B = results
    if dB is None and dm is None and not gained:
        return results
    num_rows, rank, scale = dy.shape[1], 0 if hidden is None else hidden.shape[1], float(scale)
    finish = (magnitude is not None, kept_is_output, weight_product is not None)
    dtypes = (dtype_of(kept), dtype_of(lora_B), dtype_of(magnitude), dtype_of(weight_product))
    if rank <= SMALL_RANK:
        given = (facts(dy), facts(hidden), dtypes, kept is not None, gained, finish, scale, None)
        column_blocks, parts, launch = _token_pass_launch(*given)
        part = scratch(dy.device, parts * num_rows * (rank + 1))
        counter = counters(dy.device, column_blocks)
        launch(dy, hidden, kept, *factors, None, gained_dy, part, dB, dm, weighted_B, counter)
        return results
    right, dot, num_parts = transposed_product(dy, hidden, torch.float32), None, 0
    if gained or kept is not None:
        given = (facts(dy), facts(None), dtypes, kept is not None, gained, None, scale, None)
        _, num_parts, launch = _token_pass_launch(*given)
        dot = empty(dy, num_parts, num_rows)
        launch(dy, None, kept, *factors, None, gained_dy, dot, None, None, None, None)
    num_dot_parts = 0 if kept is None else num_parts
    launch = _finish_gradients_launch(num_rows, rank, num_dot_parts, dtypes, finish, scale)
    launch(right, dot, *factors, dB, dm, weighted_B)
    return results


def _empty_results(
    dy: Tensor,
    kept: Tensor | None,
    hidden: Tensor | None,
    lora_B: Tensor | None,
    magnitude: Tensor | None,
    weight_product: Tensor | None,
    gained: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dense = torch.contiguous_format
    return (
        torch.empty_like(dy, memory_format=dense) if gained else None,
        None if hidden is None else torch.empty_like(lora_B, memory_format=dense),
        None if kept is None else torch.empty_like(magnitude, memory_format=dense),
        None if weight_product is None else torch.empty_like(lora_B, dtype=dy.dtype, memory_format=dense),
    )


output_gradients = register(
    "output_gradients(Tensor dy, Tensor? kept, Tensor? hidden, Tensor? lora_B, Tensor? magnitude, Tensor? norm, "
    "Tensor? weight_product, float scale, bool kept_is_output, bool gained) -> (Tensor?, Tensor?, Tensor?, Tensor?)",
    _output_gradients,
    lambda dy, kept, hidden, lora_B, magnitude, norm, product, scale, kept_is_output, gained: _empty_results(
        dy, kept, hidden, lora_B, magnitude, product, gained
    ),
)
"""What one read of dy [T, out] gives: g dy (``gained``), dB = s (g dy)^T hidden [out, r], dm [out], a weighted B.

``kept`` is the output y [T, out] without its bias (``kept_is_output``), whence dm = sum_t dy y / m, or the base product
x W^T, whence dm = sum_t dy (base + s hidden B^T) / n. ``weight_product`` = g V A^T [out, r] asks for the projection of
eq. 6, dL/dV += c V with c = -g dm / n: its part s c V A^T is added to dB, and the fourth result is s (c / g) B, whose
product with g V belongs to dA. Results that were not asked for are ``None``.
"""


def _dropped_gradient(x: Tensor, u: Tensor, seed: Tensor, dropout: float) -> Tensor:
    u = with_unit_stride(u)
    _, parts, launch = _token_pass_launch(facts(x), facts(u), (), False, False, None, 1.0, dropout)
    part = empty(x, parts, x.shape[1], u.shape[1])
    launch(x, u, None, None, None, None, None, seed, None, part, None, None, None, None)
    return sum_parts(part, torch.float32, 1.0 / (1.0 - dropout), transpose=True)


dropped_gradient = register(
    "dropped_gradient(Tensor x, Tensor u, Tensor seed, float dropout) -> Tensor",
    _dropped_gradient,
    lambda x, u, seed, dropout: empty(x, u.shape[1], x.shape[1]),
)
"""u^T drop(x) [r, in] in fp32, r at most 64, with the mask of ``dropped_product``."""
