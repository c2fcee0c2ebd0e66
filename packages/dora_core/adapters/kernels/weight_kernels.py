"""Triton kernels that go over a weight: its row norms, g (W + s B A), and what dL/dW says of B A and m."""

from __future__ import annotations

import triton
import triton.language as tl

from dora_core.adapters.kernels.tiles import (
    comes_last,
    gain_and_inverse,
    gain_off_zero,
    left_factor,
    low_rank_product,
    mixed,
    right_factor,
)


@triton.jit
def _updated_tile(
    weight_ptr, a_ptr, b_ptr, b, rows, start, row_mask, num_columns, scale, stride_w, stride_wc,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile [rows, columns from start] of W + s B A in fp32, the columns, and the tile's mask.

    ``b`` is all of B's rows if r fits into one block.
    """
    columns = start + tl.arange(0, BLOCK_N)
    column_mask = columns < num_columns
    mask = row_mask[:, None] & column_mask[None, :]
    place = rows[:, None].to(tl.int64) * stride_w + columns[None, :] * stride_wc
    v = tl.load(weight_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if RANK > 0:
        if RANK <= BLOCK_R:
            k = tl.arange(0, BLOCK_R)
            a = right_factor(a_ptr, columns, k, column_mask, 1, num_columns, RANK, OPERAND)
            low = tl.dot(b, a, input_precision=PRECISION)
        else:
            low = low_rank_product(
                b_ptr, a_ptr, rows, columns, row_mask, column_mask, RANK, 1, num_columns,
                RANK, BLOCK_R, OPERAND, PRECISION,
            )  # fmt: skip
        v += scale * low
    return v, columns, mask


@triton.jit
def _row_squares(
    weight_ptr, a_ptr, b_ptr, b, rows, start, row_mask, num_columns, scale, stride_w, stride_wc,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of squares [rows] of a tile of W + s B A in fp64."""
    v, _columns, _mask = _updated_tile(
        weight_ptr, a_ptr, b_ptr, b, rows, start, row_mask, num_columns, scale, stride_w, stride_wc,
        RANK, BLOCK_N, BLOCK_R, OPERAND, PRECISION,
    )  # fmt: skip
    wide = v.to(tl.float64)
    return tl.sum(wide * wide, 1)


@triton.jit
def row_norm_kernel(
    weight_ptr, a_ptr, b_ptr, part_ptr, norm_ptr, counter_ptr, address_ptr, num_rows, num_columns, columns_per_part,
    scale, stride_w, stride_wc,
    RANK: tl.constexpr, NUM_PARTS: tl.constexpr, BATCH: tl.constexpr, WALK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """norm [num_rows] in fp32, from part [p, num_rows] in fp64: the squares of V over one part of the columns.

    Without ``WALK`` a part is one tile. ``BATCH``: norm [l, num_rows] of several layers, whose W, A and B, of the
    types and sizes of those given, are at the addresses [l, 3].
    """
    if BATCH:
        layer = tl.program_id(2)
        weight_ptr = tl.multiple_of(tl.load(address_ptr + 3 * layer).to(weight_ptr.dtype), 16)
        if RANK > 0:
            a_ptr = tl.multiple_of(tl.load(address_ptr + 3 * layer + 1).to(a_ptr.dtype), 16)
            b_ptr = tl.multiple_of(tl.load(address_ptr + 3 * layer + 2).to(b_ptr.dtype), 16)
        part_ptr += layer * NUM_PARTS * num_rows
        norm_ptr += layer * num_rows
        counter_ptr += layer * tl.num_programs(0)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    b = None
    if RANK > 0:
        b = left_factor(b_ptr, rows, tl.arange(0, BLOCK_R), row_mask, RANK, RANK, OPERAND)
    first = tl.program_id(1) * columns_per_part
    if WALK:
        total = tl.zeros([BLOCK_M], tl.float64)
        for start in tl.range(
            first,
            tl.minimum(first + columns_per_part, num_columns),
            BLOCK_N,
            num_stages=STAGES,
        ):
            total += _row_squares(
                weight_ptr, a_ptr, b_ptr, b, rows, start, row_mask, num_columns, scale, stride_w, stride_wc,
                RANK, BLOCK_N, BLOCK_R, OPERAND, PRECISION,
            )  # fmt: skip
    else:
        total = _row_squares(
            weight_ptr, a_ptr, b_ptr, b, rows, first, row_mask, num_columns, scale, stride_w, stride_wc,
            RANK, BLOCK_N, BLOCK_R, OPERAND, PRECISION,
        )  # fmt: skip
    tl.store(part_ptr + tl.program_id(1) * num_rows + rows, total, mask=row_mask)
    if comes_last(counter_ptr + tl.program_id(0), NUM_PARTS):
        total = tl.zeros([BLOCK_M], tl.float64)
        for part in tl.static_range(NUM_PARTS):
            total += tl.load(
                part_ptr + part * num_rows + rows,
                mask=row_mask,
                other=0.0,
                cache_modifier=".cg",
            )
        tl.store(norm_ptr + rows, tl.sqrt(total).to(tl.float32), mask=row_mask)


@triton.jit
def _form_tile(
    weight_ptr, a_ptr, b_ptr, b, g, row_bits, out_ptr, rows, start, row_mask, num_columns, scale, stride_w, stride_wc,
    RANK: tl.constexpr, HAS_MAGNITUDE: tl.constexpr, DITHER: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store a tile of g (W + s B A)."""
    v, columns, mask = _updated_tile(
        weight_ptr, a_ptr, b_ptr, b, rows, start, row_mask, num_columns, scale, stride_w, stride_wc,
        RANK, BLOCK_N, BLOCK_R, OPERAND, PRECISION,
    )  # fmt: skip
    if HAS_MAGNITUDE:
        v *= g[:, None]
    if DITHER:
        threshold = (row_bits[:, None] ^ mixed(columns.to(tl.uint32) * 0x85EBCA77)[None, :]) & 0xFFFF
        rounded = ((v.to(tl.uint32, bitcast=True) + threshold) & 0xFFFF0000).to(tl.float32, bitcast=True)
        v = tl.where(v == v, rounded, v)
    out = out_ptr + rows[:, None].to(tl.int64) * num_columns + columns[None, :]
    tl.store(out, v.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def effective_weight_kernel(
    weight_ptr, a_ptr, b_ptr, magnitude_ptr, norm_ptr, out_ptr, num_rows, num_columns, columns_per_part, scale,
    stride_w, stride_wc,
    RANK: tl.constexpr, HAS_MAGNITUDE: tl.constexpr, DITHER: tl.constexpr, WALK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [num_rows, num_columns] = g (W + s B A), summed in fp32 and rounded once.

    ``DITHER`` rounds to bf16 up or down with a pseudo-random threshold that belongs to the element's place. A plain
    rounding would return W itself while g - 1 and s B A are below half a unit in the last place of every element (up
    to 0.4 %): the layer would not notice small magnitudes and updates at all, whereas here their sum over a row is
    right on average. What is representable, as a fresh layer's weight, is never changed. Without ``WALK`` a program
    makes one tile.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    b, g, row_bits = None, None, None
    if RANK > 0:
        b = left_factor(b_ptr, rows, tl.arange(0, BLOCK_R), row_mask, RANK, RANK, OPERAND)
    if HAS_MAGNITUDE:
        g, _inverse = gain_off_zero(magnitude_ptr, norm_ptr, rows, row_mask)
    if DITHER:
        row_bits = mixed(rows.to(tl.uint32) * 0x9E3779B1)
    first = tl.program_id(1) * columns_per_part
    if WALK:
        for start in tl.range(
            first,
            tl.minimum(first + columns_per_part, num_columns),
            BLOCK_N,
            num_stages=STAGES,
        ):
            _form_tile(
                weight_ptr, a_ptr, b_ptr, b, g, row_bits, out_ptr, rows, start, row_mask, num_columns, scale,
                stride_w, stride_wc, RANK, HAS_MAGNITUDE, DITHER, BLOCK_N, BLOCK_R, OPERAND, PRECISION,
            )  # fmt: skip
    else:
        _form_tile(
            weight_ptr, a_ptr, b_ptr, b, g, row_bits, out_ptr, rows, first, row_mask, num_columns, scale,
            stride_w, stride_wc, RANK, HAS_MAGNITUDE, DITHER, BLOCK_N, BLOCK_R, OPERAND, PRECISION,
        )  # fmt: skip


@triton.jit
def weight_gradients_kernel(
    gradient_ptr, weight_ptr, a_ptr, b_ptr, magnitude_ptr, norm_ptr, out_ptr, dm_ptr, num_rows, num_columns, scale,
    stride_w, stride_wc,
    RANK: tl.constexpr, HAS_MAGNITUDE: tl.constexpr, FULL_NORM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dm [num_rows], and out [num_rows, num_columns] = s dL/dV; see ``weight_gradients``."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    b = None
    if RANK > 0:
        b = left_factor(b_ptr, rows, tl.arange(0, BLOCK_R), row_mask, RANK, RANK, OPERAND)
    places = rows[:, None].to(tl.int64) * num_columns
    if HAS_MAGNITUDE:
        g, inverse = gain_and_inverse(magnitude_ptr, norm_ptr, rows, row_mask)
        dots = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # summed over columns once, at the end
        for start in tl.range(0, num_columns, BLOCK_N, num_stages=STAGES):
            v, columns, mask = _updated_tile(
                weight_ptr, a_ptr, b_ptr, b, rows, start, row_mask, num_columns, scale, stride_w, stride_wc,
                RANK, BLOCK_N, BLOCK_R, OPERAND, PRECISION,
            )  # fmt: skip
            dots += v * tl.load(gradient_ptr + places + columns[None, :], mask=mask, other=0.0)
        dm = tl.sum(dots, 1) * inverse
        tl.store(dm_ptr + rows, dm.to(dm_ptr.dtype.element_ty), mask=row_mask)
    for start in tl.range(0, num_columns, BLOCK_N, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (columns < num_columns)[None, :]
        gradient = tl.load(gradient_ptr + places + columns[None, :], mask=mask, other=0.0)
        if FULL_NORM:
            v, _columns, _mask = _updated_tile(
                weight_ptr, a_ptr, b_ptr, b, rows, start, row_mask, num_columns, scale, stride_w, stride_wc,
                RANK, BLOCK_N, BLOCK_R, OPERAND, PRECISION,
            )  # fmt: skip
            gradient -= (dm * inverse)[:, None] * v
        if HAS_MAGNITUDE:
            gradient *= g[:, None]
        out = out_ptr + places + columns[None, :]
        tl.store(out, (scale * gradient).to(out_ptr.dtype.element_ty), mask=mask)
