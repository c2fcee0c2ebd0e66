"""Triton kernels that go over the output's gradient, or over what dropout leaves of the input."""

from __future__ import annotations

import triton
import triton.language as tl

from dora_core.adapters.kernels.tiles import comes_last, gain_and_inverse, gain_off_zero, is_kept


@triton.jit
def _finish_gradients(
    right_ptr, dot_ptr, b_ptr, magnitude_ptr, norm_ptr, product_ptr, db_ptr, dm_ptr, cb_ptr, rows, num_rows, scale,
    NUM_PARTS: tl.constexpr, NUM_DOT_PARTS: tl.constexpr, RANK: tl.constexpr, HAS_MAGNITUDE: tl.constexpr,
    KEPT_IS_OUTPUT: tl.constexpr, FULL_NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dB and dm of ``rows`` from the parts that ``token_pass_kernel`` leaves; see ``output_gradients``."""
    row_mask = rows < num_rows
    if HAS_MAGNITUDE:
        g, inverse = gain_and_inverse(magnitude_ptr, norm_ptr, rows, row_mask)
    if NUM_DOT_PARTS > 0:
        dm = tl.zeros([BLOCK_M], tl.float32)
        for part in tl.static_range(NUM_DOT_PARTS):
            dm += tl.load(
                dot_ptr + part * num_rows + rows,
                mask=row_mask,
                other=0.0,
                cache_modifier=".cg",
            )
        if KEPT_IS_OUTPUT:
            used, _inverse = gain_off_zero(magnitude_ptr, norm_ptr, rows, row_mask)
            dm = dm / used * inverse
        else:
            for start in tl.static_range(0, RANK, BLOCK_R):
                db, low, mask = _sum_parts(
                    right_ptr, rows, row_mask, start, num_rows, NUM_PARTS, RANK, BLOCK_M, BLOCK_R
                )
                b = tl.load(b_ptr + low, mask=mask, other=0.0).to(tl.float32)
                dm += scale * tl.sum(b * db, 1)
            dm *= inverse
        tl.store(dm_ptr + rows, dm, mask=row_mask)
    for start in tl.static_range(0, RANK, BLOCK_R):
        db, low, mask = _sum_parts(right_ptr, rows, row_mask, start, num_rows, NUM_PARTS, RANK, BLOCK_M, BLOCK_R)
        if HAS_MAGNITUDE:
            db *= g[:, None]
        if FULL_NORM:
            factor = (-dm * inverse)[:, None]
            db += factor * tl.load(product_ptr + low, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + low, mask=mask, other=0.0).to(tl.float32)
            tl.store(
                cb_ptr + low,
                (scale * factor * b).to(cb_ptr.dtype.element_ty),
                mask=mask,
            )
        tl.store(db_ptr + low, (scale * db).to(db_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_parts(
    right_ptr, rows, row_mask, start, num_rows,
    NUM_PARTS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The sum over part [p, num_rows, r] of a tile of it, where the tile is, and its mask."""
    k = start + tl.arange(0, BLOCK_R)
    mask = row_mask[:, None] & (k < RANK)[None, :]
    low = rows[:, None] * RANK + k[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    place = right_ptr + low
    for _part in tl.static_range(NUM_PARTS):
        total += tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
        place += num_rows * RANK
    return total, low, mask


@triton.jit
def finish_gradients_kernel(
    right_ptr, dot_ptr, b_ptr, magnitude_ptr, norm_ptr, product_ptr, db_ptr, dm_ptr, cb_ptr, num_rows, scale,
    NUM_PARTS: tl.constexpr, NUM_DOT_PARTS: tl.constexpr, RANK: tl.constexpr, HAS_MAGNITUDE: tl.constexpr,
    KEPT_IS_OUTPUT: tl.constexpr, FULL_NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dB and dm, where dB's parts do not come from ``token_pass_kernel``."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    _finish_gradients(
        right_ptr, dot_ptr, b_ptr, magnitude_ptr, norm_ptr, product_ptr, db_ptr, dm_ptr, cb_ptr, rows, num_rows, scale,
        NUM_PARTS, NUM_DOT_PARTS, RANK, HAS_MAGNITUDE, KEPT_IS_OUTPUT, FULL_NORM, BLOCK_M, BLOCK_R,
    )  # fmt: skip


@triton.jit
def token_pass_kernel(
    x_ptr, hidden_ptr, kept_ptr, b_ptr, magnitude_ptr, norm_ptr, product_ptr, seed_ptr, gained_ptr, part_ptr,
    db_ptr, dm_ptr, cb_ptr, counter_ptr, num_tokens, num_columns, tokens_per_part, scale, threshold, stride_x,
    stride_xc, stride_h,
    RANK: tl.constexpr, RIGHT: tl.constexpr, DOT: tl.constexpr, GAINED: tl.constexpr, DROPOUT: tl.constexpr,
    FINISH: tl.constexpr, NUM_PARTS: tl.constexpr, HAS_MAGNITUDE: tl.constexpr, KEPT_IS_OUTPUT: tl.constexpr,
    FULL_NORM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Up to three results from one read of drop(x) [T, N].

    RIGHT: right [p, N, r], the part of x^T hidden over this program's tokens, for hidden [T, r].
    DOT: dot [p, N], the part of sum_t x kept over this program's tokens, for kept [T, N]; it lies behind ``right``.
    GAINED: gained [T, N] = g x.
    FINISH: the last program of some columns makes dB and dm of them.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < num_columns
    k = tl.arange(0, BLOCK_R)
    rank_mask = k < RANK
    first = tl.program_id(1) * tokens_per_part
    right_ptr = part_ptr
    dot_ptr = part_ptr + tl.num_programs(1).to(tl.int64) * num_columns * RANK
    if GAINED:
        g, _inverse = gain_and_inverse(magnitude_ptr, norm_ptr, columns, column_mask)
    if RIGHT:
        right = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    if DOT:
        dots = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)  # summed over tokens once, at the end
    for start in tl.range(
        first,
        tl.minimum(first + tokens_per_part, num_tokens),
        BLOCK_T,
        num_stages=STAGES,
    ):
        tokens = start + tl.arange(0, BLOCK_T)
        token_mask = tokens < num_tokens
        wide_tokens = tokens.to(tl.int64)
        mask = token_mask[:, None] & column_mask[None, :]
        place = wide_tokens[:, None] * num_columns + columns[None, :]
        x = tl.load(
            x_ptr + wide_tokens[:, None] * stride_x + columns[None, :] * stride_xc,
            mask=mask,
            other=0.0,
        )
        if DROPOUT:
            x = tl.where(is_kept(seed_ptr, tokens, columns, threshold), x, 0.0)
        if GAINED:
            gained = (x.to(tl.float32) * g[None, :]).to(gained_ptr.dtype.element_ty)
            tl.store(gained_ptr + place, gained, mask=mask)
        if DOT:
            kept = tl.load(kept_ptr + place, mask=mask, other=0.0)
            dots += x.to(tl.float32) * kept.to(tl.float32)
        if RIGHT:
            hidden = tl.load(
                hidden_ptr + wide_tokens[:, None] * stride_h + k[None, :],
                mask=token_mask[:, None] & rank_mask[None, :],
                other=0.0,
            )
            right = tl.dot(
                tl.trans(x.to(OPERAND)),
                hidden.to(OPERAND),
                right,
                input_precision=PRECISION,
            )
    if RIGHT:
        place = (tl.program_id(1).to(tl.int64) * num_columns + columns[:, None]) * RANK + k[None, :]
        tl.store(right_ptr + place, right, mask=column_mask[:, None] & rank_mask[None, :])
    if DOT:
        tl.store(
            dot_ptr + tl.program_id(1) * num_columns + columns,
            tl.sum(dots, 0),
            mask=column_mask,
        )
    if FINISH:  # noqa: SIM102  (a constant: without it the counter must not be touched)
        if comes_last(counter_ptr + tl.program_id(0), NUM_PARTS):
            _finish_gradients(
                right_ptr, dot_ptr, b_ptr, magnitude_ptr, norm_ptr, product_ptr, db_ptr, dm_ptr, cb_ptr, columns,
                num_columns, scale, NUM_PARTS if RIGHT else 0, NUM_PARTS if DOT else 0, RANK, HAS_MAGNITUDE,
                KEPT_IS_OUTPUT, FULL_NORM, BLOCK_N, BLOCK_R,
            )  # fmt: skip
