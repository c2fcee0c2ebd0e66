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
    Launch,
    cdiv,
    contiguous,
    dropout_threshold,
    dtype_of,
    empty,
    facts,
    low_rank_tiles,
    operand,
    rank_block,
    split,
    with_unit_stride,
)
from dora_core.adapters.kernels.library import register

_compose_kernel = Kernel(token_kernels.compose_kernel)
_dropped_product_kernel = Kernel(token_kernels.dropped_product_kernel)
_masked_kernel = Kernel(token_kernels.masked_kernel)
_finish_sum_kernel = Kernel(token_kernels.finish_sum_kernel)


@lru_cache(MAX_KNOWN)
def _compose_launch(
    num_tokens: int,
    num_columns: int,
    dtype: torch.dtype,
    hidden: tuple,
    factor: tuple,
    magnitude: torch.dtype | None,
    bias: torch.dtype | None,
    scale: float,
    has_dropout: bool,
    dropout: float,
) -> Launch:
    (shape, (stride_h, _), _), (_, factor_strides, _) = hidden, factor
    rank = shape[1] if shape else 0
    column_blocks = cdiv(num_columns, 128)
    block_t, tiles = low_rank_tiles(rank, (32, 64, 128), dtype)
    parts, per_part = split(num_tokens, block_t, column_blocks, NUM_PROGRAMS if tiles["WALK"] else None)
    scale, threshold = scale / (1.0 - dropout), dropout_threshold(dropout)
    return _compose_kernel.bind(
        (column_blocks, parts, 1),
        (num_tokens, num_columns, per_part, scale, threshold, stride_h, *factor_strides),
        RANK=rank,
        HAS_MAGNITUDE=magnitude is not None,
        HAS_BIAS=bias is not None,
        DROPOUT=has_dropout,
        BLOCK_T=block_t,
        BLOCK_N=128,
        STAGES=4,
        **tiles,
        **operand(dtype),
    )


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
    *,
    over: bool = False,
) -> Tensor:
    base, hidden = contiguous(base), with_unit_stride(hidden)
    num_columns = base.shape[-1]
    sizes = (base.numel() // num_columns, num_columns, base.dtype)
    given = (facts(hidden), facts(factor), dtype_of(magnitude), dtype_of(bias))
    launch = _compose_launch(*sizes, *given, float(scale), seed is not None, dropout)
    out = base if over else torch.empty_like(base)
    launch(base, hidden, factor, magnitude, norm, bias, seed, out)
    return out


compose = register(
    "compose(Tensor base, Tensor? hidden, Tensor? factor, Tensor? magnitude, Tensor? norm, Tensor? bias, "
    "float scale, Tensor? seed=None, float dropout=0.0) -> Tensor",
    _compose,
    lambda base, *_: base.new_empty(base.shape),
)
"""g (base + s drop(hidden factor^T)) + bias for base [..., N] with T rows, hidden [T, r], factor [N, r] (B, or A^T).

``over=True`` allows to return it in the memory of a contiguous base that nobody needs any more.
"""


def sum_parts(part: Tensor, dtype: torch.dtype, factor: float, *, transpose: bool = False) -> Tensor:
    """Return factor times the sum over the first dimension of part [p, M, N], in ``dtype``: [M, N], or [N, M]."""
    num_parts, num_rows, num_columns = part.shape
    out = empty(part, *((num_columns, num_rows) if transpose else (num_rows, num_columns)), dtype=dtype)
    if out.numel():
        _finish_sum_launch(num_parts, out.numel(), num_rows if transpose else 1, float(factor), dtype)(part, out)
    return out


@lru_cache(MAX_KNOWN)
def _finish_sum_launch(num_parts: int, num_elements: int, num_rows: int, factor: float, dtype: torch.dtype) -> Launch:
    grid = (cdiv(num_elements, 1024), 1, 1)
    return _finish_sum_kernel.bind(grid, (num_elements, num_rows, factor), NUM_PARTS=num_parts, BLOCK=1024)


@lru_cache(MAX_KNOWN)
def _dropped_product_launch(
    num_tokens: int,
    num_columns: int,
    strides: tuple,
    dtype: torch.dtype,
    rank: int,
    a_dtype: torch.dtype,
    dropout: float,
) -> tuple[int, Launch]:
    block_n = 64 if torch.float32 in (dtype, a_dtype) else 128  # loads in flight fill the shared memory
    token_blocks = cdiv(num_tokens, 64)
    parts, per_part = split(num_columns, block_n, token_blocks, NUM_PROGRAMS)
    return parts, _dropped_product_kernel.bind(
        (token_blocks, parts, 1),
        (num_tokens, num_columns, per_part, dropout_threshold(dropout), *strides),
        RANK=rank,
        BLOCK_T=64,
        BLOCK_N=block_n,
        BLOCK_R=rank_block(rank),
        **operand(dtype),
    )


def _dropped_product(x: Tensor, lora_A: Tensor, seed: Tensor, dropout: float) -> Tensor:
    num_tokens, num_columns = x.shape
    rank = lora_A.shape[0]
    sizes = (num_tokens, num_columns, x.stride(), x.dtype, rank, lora_A.dtype)
    parts, launch = _dropped_product_launch(*sizes, dropout)
    part = empty(x, parts, num_tokens, rank)
    if num_tokens:
        launch(x, lora_A.contiguous(), seed, part)
    return sum_parts(part, x.dtype, 1.0 / (1.0 - dropout))


dropped_product = register(
    "dropped_product(Tensor x, Tensor lora_A, Tensor seed, float dropout) -> Tensor",
    _dropped_product,
    lambda x, lora_A, seed, dropout: empty(x, x.shape[0], lora_A.shape[0], dtype=x.dtype),
)
"""drop(x) A^T [T, r] for x [T, in] and A [r, in], r at most 64.

The mask follows from ``seed`` (int64, one element) and the place.
"""


@lru_cache(MAX_KNOWN)
def _masked_launch(value: tuple, has_base: bool, dropout: float) -> Launch:
    (num_tokens, num_columns), strides, _ = value
    grid = (cdiv(num_tokens, 32), cdiv(num_columns, 128), 1)
    numbers = (num_tokens, num_columns, dropout_threshold(dropout), *strides)
    return _masked_kernel.bind(grid, numbers, HAS_BASE=has_base, BLOCK_T=32, BLOCK_N=128)


def _masked(value: Tensor, base: Tensor | None, seed: Tensor, dropout: float, *, over: bool = False) -> Tensor:
    base = contiguous(base)
    out = base if over else torch.empty_like(value, memory_format=torch.contiguous_format)
    if value.numel():
        _masked_launch(facts(value), base is not None, dropout)(value, base, seed, out)
    return out


masked = register(
    "masked(Tensor value, Tensor? base, Tensor seed, float dropout) -> Tensor",
    _masked,
    lambda value, *_: value.new_empty(value.shape),
)
"""base + (1 - p) drop(value) [T, N], with the mask of ``dropped_product`` and 0 for no base.

``over=True`` allows to return it in the memory of a contiguous base that nobody needs any more.
"""
