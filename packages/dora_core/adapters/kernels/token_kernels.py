"""Triton kernels that go over a matrix of tokens [T, N] in the forward pass."""

from __future__ import annotations

import triton
import triton.language as tl

from dora_core.adapters.kernels.tiles import gain_off_zero, is_kept, left_factor, low_rank_product, right_factor


@triton.jit
def _compose_tile(
    base_ptr, hidden_ptr, factor_ptr, factor, g, bias, seed_ptr, out_ptr, start, columns, column_mask, num_tokens,
    num_columns, scale, threshold, stride_h, stride_f, stride_fk,
    RANK: tl.constexpr, HAS_MAGNITUDE: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store a tile of g (base + s drop(hidden factor^T)) + bias; ``factor`` is all of it if r fits into one block."""
    tokens = start + tl.arange(0, BLOCK_T)
    token_mask = tokens < num_tokens
    mask = token_mask[:, None] & column_mask[None, :]
    place = tokens[:, None].to(tl.int64) * num_columns + columns[None, :]
    if RANK > BLOCK_R:
        low = low_rank_product(
            hidden_ptr, factor_ptr, tokens, columns, token_mask, column_mask, stride_h, stride_f, stride_fk,
            RANK, BLOCK_R, OPERAND, PRECISION,
        )  # fmt: skip
    y = tl.load(base_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if RANK > 0:
        if RANK <= BLOCK_R:
            k = tl.arange(0, BLOCK_R)
            hidden = left_factor(hidden_ptr, tokens, k, token_mask, stride_h, RANK, OPERAND)
            low = tl.dot(hidden, factor, input_precision=PRECISION)
        if DROPOUT:
            low = tl.where(is_kept(seed_ptr, tokens, columns, threshold), low, 0.0)
        y += scale * low
    if HAS_MAGNITUDE:
        y *= g[None, :]
    if HAS_BIAS:
        y += bias[None, :]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def compose_kernel(
    base_ptr, hidden_ptr, factor_ptr, magnitude_ptr, norm_ptr, bias_ptr, seed_ptr, out_ptr, num_tokens, num_columns,
    tokens_per_part, scale, threshold, stride_h, stride_f, stride_fk,
    RANK: tl.constexpr, HAS_MAGNITUDE: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    WALK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [T, N] = g (base + s drop(hidden factor^T)) + bias for hidden [T, r] and factor [N, r].

    Without ``WALK`` a program makes one tile.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < num_columns
    factor, g, bias = None, None, None
    if RANK > 0:
        k = tl.arange(0, BLOCK_R)
        factor = right_factor(factor_ptr, columns, k, column_mask, stride_f, stride_fk, RANK, OPERAND)
    if HAS_MAGNITUDE:
        g, _inverse = gain_off_zero(magnitude_ptr, norm_ptr, columns, column_mask)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    first = tl.program_id(1) * tokens_per_part
    if WALK:
        for start in tl.range(
            first,
            tl.minimum(first + tokens_per_part, num_tokens),
            BLOCK_T,
            num_stages=STAGES,
        ):
            _compose_tile(
                base_ptr, hidden_ptr, factor_ptr, factor, g, bias, seed_ptr, out_ptr, start, columns, column_mask,
                num_tokens, num_columns, scale, threshold, stride_h, stride_f, stride_fk,
                RANK, HAS_MAGNITUDE, HAS_BIAS, DROPOUT, BLOCK_T, BLOCK_R, OPERAND, PRECISION,
            )  # fmt: skip
    else:
        _compose_tile(
            base_ptr, hidden_ptr, factor_ptr, factor, g, bias, seed_ptr, out_ptr, first, columns, column_mask,
            num_tokens, num_columns, scale, threshold, stride_h, stride_f, stride_fk,
            RANK, HAS_MAGNITUDE, HAS_BIAS, DROPOUT, BLOCK_T, BLOCK_R, OPERAND, PRECISION,
        )  # fmt: skip


@triton.jit
def dropped_product_kernel(
    x_ptr, a_ptr, seed_ptr, part_ptr, num_tokens, num_columns, columns_per_part, threshold, stride_x, stride_xc,
    RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """part [p, T, r]: drop(x) A^T over one part of the columns, for x [T, N] and A [r, N]."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = tokens < num_tokens
    wide_tokens = tokens.to(tl.int64)
    k = tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * columns_per_part
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(first, tl.minimum(first + columns_per_part, num_columns), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        column_mask = columns < num_columns
        x = tl.load(
            x_ptr + wide_tokens[:, None] * stride_x + columns[None, :] * stride_xc,
            mask=token_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        x = tl.where(is_kept(seed_ptr, tokens, columns, threshold), x, 0.0)
        a = tl.load(
            a_ptr + k[None, :] * num_columns + columns[:, None],
            mask=column_mask[:, None] & (k < RANK)[None, :],
            other=0.0,
        )
        total = tl.dot(x.to(OPERAND), a.to(OPERAND), total, input_precision=PRECISION)
    place = (tl.program_id(1).to(tl.int64) * num_tokens + wide_tokens[:, None]) * RANK + k[None, :]
    tl.store(part_ptr + place, total, mask=token_mask[:, None] & (k < RANK)[None, :])


@triton.jit
def masked_kernel(
    value_ptr, base_ptr, seed_ptr, out_ptr, num_tokens, num_columns, threshold, stride, stride_c,
    HAS_BASE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [T, N] = base + value where the mask keeps it, base alone (0 without one) where it does not."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (tokens < num_tokens)[:, None] & (columns < num_columns)[None, :]
    wide_tokens = tokens[:, None].to(tl.int64)
    value = tl.load(value_ptr + wide_tokens * stride + columns[None, :] * stride_c, mask=mask, other=0.0)
    total = tl.where(is_kept(seed_ptr, tokens, columns, threshold), value, 0.0).to(tl.float32)
    place = wide_tokens * num_columns + columns[None, :]
    if HAS_BASE:
        total += tl.load(base_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_sum_kernel(
    part_ptr,
    out_ptr,
    num_elements,
    num_rows,
    factor,
    NUM_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [columns, rows] = factor times the sum over part [p, rows, columns], transposed; as it lies with one row."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < num_elements
    total = tl.zeros([BLOCK], tl.float32)
    place = part_ptr + places
    for _part in tl.static_range(NUM_PARTS):
        total += tl.load(place, mask=mask, other=0.0)
        place += num_elements
    num_columns = num_elements // num_rows
    places = places % num_columns * num_rows + places // num_columns
    tl.store(out_ptr + places, (factor * total).to(out_ptr.dtype.element_ty), mask=mask)
