"""Operators on matrices of tokens: the composed output, and the low-rank product of what dropout leaves."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dora_core.adapters.kernels import token_kernels
from dora_core.adapters.kernels.launch import (
    MAX_KNOWN,
    NUM_PROGRAMS,
    Kernel,
    cdiv,
    contiguous,
    dropout_threshold,
    empty,
    low_rank_tiles,
    operand,
    rank_block,
    split,
    with_unit_stride,
)
from dora_core.adapters.kernels.library import register

_compose_kernel = Kernel(token_kernels.compose_kernel)
_dropped_product_kernel = Kernel(token_kernels.dropped_product_kernel)
_finish_sum_kernel = Kernel(token_kernels.finish_sum_kernel)


@lru_cache(MAX_KNOWN)
def _compose_plan(
    num_tokens: int,
    num_columns: int,
    rank: int,
    has_magnitude: bool,
    has_bias: bool,
    dropout: bool,
    dtype: torch.dtype,
) -> tuple:
    column_blocks = cdiv(num_columns, 128)
    block_t, tiles = low_rank_tiles(rank, (32, 64, 128), dtype)
    num_programs = NUM_PROGRAMS if tiles["WALK"] else column_blocks * num_tokens
    parts, per_part = split(num_tokens, block_t, column_blocks, num_programs)
    constants = _compose_kernel.in_order(
        RANK=rank,
        HAS_MAGNITUDE=has_magnitude,
        HAS_BIAS=has_bias,
        DROPOUT=dropout,
        BLOCK_T=block_t,
        BLOCK_N=128,
        STAGES=4,
        **tiles,
        **operand(dtype),
    )
    return (column_blocks, parts, 1), per_part, constants


def _compose(
    base: Tensor,
    hidden: Tensor | None,
    factor: Tensor | None,
    magnitude: Tensor | None,
    norm: Tensor | None,
    bias: Tensor | None,
    scale: float,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    base = contiguous(base)
    num_columns = base.shape[-1]
    num_tokens = base.numel() // num_columns
    hidden, rank, hidden_stride = with_unit_stride(hidden)
    flags = (magnitude is not None, bias is not None, seed is not None)
    grid, per_part, constants = _compose_plan(num_tokens, num_columns, rank, *flags, base.dtype)
    factor_strides = (0, 0) if factor is None else factor.stride()
    scale, threshold = scale / (1.0 - dropout), dropout_threshold(dropout)
    numbers = (
        num_tokens,
        num_columns,
        per_part,
        scale,
        threshold,
        hidden_stride,
        *factor_strides,
    )
    out = torch.empty_like(base)
    _compose_kernel(
        grid,
        (base, hidden, factor, magnitude, norm, bias, seed, out),
        numbers,
        constants,
    )
    return out


compose = register(
    "compose(Tensor base, Tensor? hidden, Tensor? factor, Tensor? magnitude, Tensor? norm, Tensor? bias, "
    "float scale, Tensor? seed=None, float dropout=0.0) -> Tensor",
    _compose,
    lambda base, *_: base.new_empty(base.shape),
)
"""g (base + s drop(hidden factor^T)) + bias for base [..., N] with T rows, hidden [T, r], factor [N, r] (B, or A^T)."""


def sum_parts(part: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
    """Return factor times the sum over the first dimension, in ``dtype``."""
    out = empty(part, *part.shape[1:], dtype=dtype)
    num = out.numel()
    if num:
        _finish_sum_kernel(
            (cdiv(num, 1024), 1, 1),
            (part, out),
            (num, float(factor)),
            (part.shape[0], 1024),
        )
    return out


def _dropped_product(x: Tensor, lora_A: Tensor, seed: Tensor, dropout: float) -> Tensor:
    num_tokens, num_columns = x.shape
    rank, block_r = lora_A.shape[0], rank_block(lora_A.shape[0])
    token_blocks, rank_blocks = cdiv(num_tokens, 64), cdiv(rank, block_r)
    parts, per_part = split(num_columns, 128, token_blocks * rank_blocks, NUM_PROGRAMS)
    part = empty(x, parts, num_tokens, rank)
    if num_tokens:
        constants = _dropped_product_kernel.in_order(
            RANK=rank, BLOCK_T=64, BLOCK_N=128, BLOCK_R=block_r, **operand(x.dtype)
        )
        numbers = (num_tokens, num_columns, per_part, dropout_threshold(dropout), *x.stride())
        tensors = (x, lora_A.contiguous(), seed, part)
        _dropped_product_kernel((token_blocks, parts, rank_blocks), tensors, numbers, constants)
    return sum_parts(part, x.dtype, 1.0 / (1.0 - dropout))


dropped_product = register(
    "dropped_product(Tensor x, Tensor lora_A, Tensor seed, float dropout) -> Tensor",
    _dropped_product,
    lambda x, lora_A, seed, dropout: empty(x, x.shape[0], lora_A.shape[0], dtype=x.dtype),
)
"""drop(x) A^T [T, r] for x [T, in] and A [r, in]. The mask follows from ``seed`` (int64, one element) and the place."""
