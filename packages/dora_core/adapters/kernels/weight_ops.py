"""Operators on a frozen weight W [out, in] with its low-rank factors: row norms, g (W + s B A), and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dora_core.adapters.kernels import weight_kernels
from dora_core.adapters.kernels.dispatch import casts_factors
from dora_core.adapters.kernels.launch import (
    MAX_KNOWN,
    NUM_PROGRAMS,
    Kernel,
    Launch,
    cdiv,
    contiguous,
    counters,
    dtype_of,
    empty,
    facts,
    low_rank_tiles,
    operand,
    rank_block,
    split,
)
from dora_core.adapters.kernels.library import register
from dora_core.adapters.kernels.projection import Stack

_row_norm_kernel = Kernel(weight_kernels.row_norm_kernel)
_effective_weight_kernel = Kernel(weight_kernels.effective_weight_kernel)
_weight_gradients_kernel = Kernel(weight_kernels.weight_gradients_kernel)


@lru_cache(MAX_KNOWN)
def _row_norm_launch(
    weight: tuple, lora_A: tuple, lora_B: tuple, scale: float, num_layers: int, batch: bool
) -> tuple[int, int, Launch]:
    """Return the number of blocks of rows and of parts of columns beside the launch."""
    ((num_rows, num_columns), strides, dtype), (shape, _, a_dtype), (_, _, b_dtype) = weight, lora_A, lora_B
    rank = shape[0] if shape else 0
    types = operand(a_dtype or torch.float32, b_dtype or torch.float32)
    if dtype.itemsize == 2:  # beside which factors in fp32 need not be multiplied in three products
        types["PRECISION"] = "tf32"
    block_m, tiles = low_rank_tiles(rank, (64, 64, 128), b_dtype or torch.float32)
    row_blocks = cdiv(num_rows, block_m)
    num_programs = NUM_PROGRAMS // 2 if tiles["WALK"] else None
    parts, per_part = split(num_columns, 128, row_blocks, num_programs)
    launch = _row_norm_kernel.bind(
        (row_blocks, parts, num_layers),
        (num_rows, num_columns, per_part, scale, *strides),
        RANK=rank,
        NUM_PARTS=parts,
        BATCH=batch,
        BLOCK_M=block_m,
        BLOCK_N=128,
        STAGES=3 if dtype.itemsize == 2 else 2,  # loads in flight fill the shared memory
        **tiles,
        **types,
    )
    return row_blocks, parts, launch


def _launch_row_norm(
    weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scale: float, addresses: Tensor | None = None
) -> Tensor:
    """Return norm [l, out] of the layers at ``addresses`` [l, 3], which are like the one given, or of that one."""
    num_rows, num_layers = weight.shape[0], 1 if addresses is None else len(addresses)
    given = (facts(weight), facts(lora_A), facts(lora_B))
    row_blocks, parts, launch = _row_norm_launch(*given, float(scale), num_layers, addresses is not None)
    part = empty(weight, num_layers, parts, num_rows, dtype=torch.float64)
    norm = empty(weight, num_layers, num_rows)
    launch(weight, lora_A, lora_B, part, norm, counters(weight.device, num_layers * row_blocks), addresses)
    return norm


def _row_norm(weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scale: float) -> Tensor:
    if casts_factors(weight, lora_B):
        lora_A, lora_B = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
    return _launch_row_norm(weight, contiguous(lora_A), contiguous(lora_B), scale)[0]


row_norm = register(
    "row_norm(Tensor weight, Tensor? lora_A, Tensor? lora_B, float scale) -> Tensor",
    _row_norm,
    lambda weight, lora_A, lora_B, scale: empty(weight, weight.shape[0]),
)
"""n [out] in fp32, the row norms of W + s B A [out, in]. Squares are summed in fp64, as by the plain ``row_norm``."""


def row_norms(
    layers: Sequence[tuple[Tensor, Tensor | None, Tensor | None]], scale: float, addresses: tuple[int, ...]
) -> Tensor:
    """Return the norms [l, out] of several layers in one launch: bit for bit what ``row_norm`` returns for each.

    ``addresses`` has three numbers for each layer, where W, A and B begin, multiples of 16 and 0 for what the layers
    lack. All must be contiguous tensors of the types and sizes of those of the first layer. Factors that ``row_norm``
    would cast are joined and cast together. Not an operator, as nothing could be known of what is at the addresses.
    """
    weight, lora_A, lora_B = layers[0]
    if casts_factors(weight, lora_B):
        joined = [torch.stack([layer[place] for layer in layers]).to(weight.dtype) for place in (1, 2)]
        lora_A, lora_B = joined[0][0], joined[1][0]
        places = zip(addresses[::3], *[[factor.data_ptr() for factor in each.unbind()] for each in joined], strict=True)
        addresses = tuple([place for each in places for place in each])
    return _launch_row_norm(weight, lora_A, lora_B, scale, _table(weight.device, addresses))


@lru_cache(MAX_KNOWN)
def _table(device: torch.device, addresses: tuple[int, ...]) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device).view(-1, 3)


@lru_cache(MAX_KNOWN)
def _effective_weight_launch(
    weight: tuple, lora_A: tuple, lora_B: tuple, magnitude: torch.dtype | None, scale: float, dtype: torch.dtype
) -> Launch:
    ((num_rows, num_columns), strides, _), (shape, _, _) = weight, lora_A
    rank = shape[0] if shape else 0
    block_m, tiles = low_rank_tiles(rank, (32, 64, 64), dtype)
    row_blocks = cdiv(num_rows, block_m)
    num_programs = 2 * NUM_PROGRAMS if tiles["WALK"] else None
    parts, per_part = split(num_columns, 128, row_blocks, num_programs)
    return _effective_weight_kernel.bind(
        (row_blocks, parts, 1),
        (num_rows, num_columns, per_part, scale, *strides),
        RANK=rank,
        HAS_MAGNITUDE=magnitude is not None,
        DITHER=dtype == torch.bfloat16,
        BLOCK_M=block_m,
        BLOCK_N=128,
        STAGES=3,
        **tiles,
        **operand(dtype),
    )


def _effective_weight(
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    magnitude: Tensor | None,
    norm: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    lora_A, lora_B = contiguous(lora_A), contiguous(lora_B)
    given = (facts(weight), facts(lora_A), facts(lora_B), dtype_of(magnitude))
    launch = _effective_weight_launch(*given, float(scale), dtype)
    out = weight.new_empty(weight.shape, dtype=dtype)
    launch(weight, lora_A, lora_B, magnitude, norm, out)
    return out


effective_weight = register(
    "effective_weight(Tensor weight, Tensor? lora_A, Tensor? lora_B, Tensor? magnitude, Tensor? norm, float scale, "
    "ScalarType dtype) -> Tensor",
    _effective_weight,
    lambda weight, lora_A, lora_B, magnitude, norm, scale, dtype: empty(weight, *weight.shape, dtype=dtype),
)
"""g (W + s B A) [out, in] in ``dtype``; bf16 is rounded without bias, see ``effective_weight_kernel``."""


def formed_weight(stack: Stack, i: int) -> Tensor:
    """Return g (W + s B A) [out, in] of a layer in the stack's type, formed anew."""
    p = stack.projections[i]
    factors = (stack.lora_A(i), stack.lora_B(i)) if p.rank else (None, None)
    return effective_weight(p.weight, *factors, p.magnitude, p.norm, p.settings.scale, stack.dtype)


@lru_cache(MAX_KNOWN)
def _weight_gradients_launch(
    weight: tuple, lora_A: tuple, dtypes: tuple[torch.dtype | None, ...], scale: float, full_norm: bool
) -> Launch:
    ((num_rows, num_columns), strides, _), (shape, _, _) = weight, lora_A
    dtype, magnitude, *_ = dtypes
    rank = shape[0] if shape else 0
    return _weight_gradients_kernel.bind(
        (cdiv(num_rows, 16), 1, 1),
        (num_rows, num_columns, scale, *strides),
        RANK=rank,
        HAS_MAGNITUDE=magnitude is not None,
        FULL_NORM=full_norm,
        BLOCK_M=16,
        BLOCK_N=128,
        BLOCK_R=rank_block(rank, 128),
        STAGES=2,
        **operand(dtype),
    )


def _weight_gradients(
    gradient: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    magnitude: Tensor | None,
    norm: Tensor | None,
    scale: float,
    full_norm: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    lora_A, lora_B = contiguous(lora_A), contiguous(lora_B)
    dtypes = (dtype, dtype_of(magnitude), dtype_of(lora_A), dtype_of(lora_B))
    launch = _weight_gradients_launch(facts(weight), facts(lora_A), dtypes, float(scale), full_norm)
    out, dm = _empty_gradients(gradient, magnitude, dtype)
    launch(contiguous(gradient), weight, lora_A, lora_B, magnitude, norm, out, dm)
    return out, dm


def _empty_gradients(gradient: Tensor, magnitude: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return empty(gradient, *gradient.shape, dtype=dtype), None if magnitude is None else torch.empty_like(magnitude)


weight_gradients = register(
    "weight_gradients(Tensor gradient, Tensor weight, Tensor? lora_A, Tensor? lora_B, Tensor? magnitude, "
    "Tensor? norm, float scale, bool full_norm, ScalarType dtype) -> (Tensor, Tensor?)",
    _weight_gradients,
    lambda gradient, weight, lora_A, lora_B, magnitude, norm, scale, full_norm, dtype: _empty_gradients(
        gradient, magnitude, dtype
    ),
)
"""s dL/dV [out, in] in ``dtype``, with V = W + s B A, and dm [out], from the gradient G [out, in] of W' = g V in fp32.

dm = sum_i G V / n. dL/dV = g G, or g (G - (dm / n) V) where the norm is differentiated (eq. 6); G without m.
"""
