"""What the Triton kernels have in common: gains, pseudo-random bits and tiles of low-rank factors.

Programs that share a sum each leave their part, and the one that comes last adds the parts in order: atomics only
count, and the same inputs give the same bits. A program holds a tile of the smaller factor and walks along the large
matrix, so that loads of the next tiles overlap with the work on this one. Names are those of ``functional.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST_NORMAL = tl.constexpr(1.17549435e-38)
SMALLEST_GAIN = tl.constexpr(2.0**-60)


@triton.jit
def gain_and_inverse(magnitude_ptr, norm_ptr, rows, row_mask):
    """g = m / n; 1 for a row of zeros. Also 1 / n, which is 0 there."""
    norm = tl.load(norm_ptr + rows, mask=row_mask, other=1.0)
    magnitude = tl.load(magnitude_ptr + rows, mask=row_mask, other=1.0).to(tl.float32)
    alive = norm >= SMALLEST_NORMAL
    norm = tl.where(alive, norm, 1.0)
    return tl.where(alive, tl.math.div_rn(magnitude, norm), 1.0), tl.where(alive, 1.0 / norm, 0.0)


@triton.jit
def gain_off_zero(magnitude_ptr, norm_ptr, rows, row_mask):
    """g, kept off zero: m's gradient is taken from the output over m, also where m is 0 (2^-60 changes no output)."""
    g, inverse = gain_and_inverse(magnitude_ptr, norm_ptr, rows, row_mask)
    return tl.where(tl.abs(g) < SMALLEST_GAIN, tl.where(g < 0, -SMALLEST_GAIN, SMALLEST_GAIN), g), inverse


@triton.jit
def mixed(bits):
    """A 32-bit integer hash whose output bits all depend on all input bits (two rounds of multiply and xor-shift)."""
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    bits ^= bits >> 16
    return bits


@triton.jit
def is_kept(seed_ptr, rows, columns, threshold):
    """The dropout mask: true with probability 1 - threshold / 2^32, by the seed and the element's place alone.

    Rows and columns are mixed alone, so that an element takes few operations more; its highest bits are the best.
    """
    by_row = mixed(rows.to(tl.uint32) * 0x9E3779B1 + tl.load(seed_ptr).to(tl.uint32))
    by_column = mixed(columns.to(tl.uint32) * 0x85EBCA77 + 0x1234567)
    bits = (by_row[:, None] ^ by_column[None, :]) * 0x7FEB352D
    return (bits ^ (bits >> 15)) * 0x846CA68B >= threshold.to(tl.uint32)


@triton.jit
def left_factor(factor_ptr, rows, k, row_mask, stride, RANK: tl.constexpr, OPERAND: tl.constexpr):
    """A tile [rows, k] of a low-rank factor [N, r] with rows of ``stride``, zero beyond its edges."""
    place = factor_ptr + rows[:, None].to(tl.int64) * stride + k[None, :]
    return tl.load(place, mask=row_mask[:, None] & (k < RANK)[None, :], other=0.0).to(OPERAND)


@triton.jit
def right_factor(
    factor_ptr,
    columns,
    k,
    column_mask,
    stride,
    stride_k,
    RANK: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """A tile [k, columns] of the transpose of a low-rank factor [N, r], zero beyond its edges."""
    place = factor_ptr + columns[None, :].to(tl.int64) * stride + k[:, None] * stride_k
    return tl.load(place, mask=column_mask[None, :] & (k < RANK)[:, None], other=0.0).to(OPERAND)


@triton.jit
def low_rank_product(
    left_ptr, right_ptr, rows, columns, row_mask, column_mask, stride_l, stride_r, stride_rk,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left [rows, r] times right [columns, r]^T in fp32."""
    total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in range(0, RANK, BLOCK_R):
        k = start + tl.arange(0, BLOCK_R)
        left = left_factor(left_ptr, rows, k, row_mask, stride_l, RANK, OPERAND)
        right = right_factor(right_ptr, columns, k, column_mask, stride_r, stride_rk, RANK, OPERAND)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def comes_last(counter_ptr, NUM_PARTS: tl.constexpr):
    """Whether all others of ``NUM_PARTS`` programs came here before; then what they stored can be read.

    The counter must be 0 before the first and is 0 again after the last.
    """
    tl.debug_barrier()  # all threads of this program have stored
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == NUM_PARTS - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
