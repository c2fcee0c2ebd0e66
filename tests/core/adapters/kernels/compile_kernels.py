"""Compile every kernel for a GPU that need not be there; prints the names of those that were compiled."""

from __future__ import annotations

import inspect

import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_for

from dora_core.adapters.kernels import gradient_kernels, token_kernels, weight_kernels
from dora_core.adapters.kernels.launch import low_rank_tiles

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {"OPERAND": tl.bfloat16, "PRECISION": "tf32"}
HALF, FULL, WIDE, SEED, COUNTER = "*bf16", "*fp32", "*fp64", "*i64", "*i32"
SIZES = ("i32", "i32", "i32")


def compile_kernel(function, pointers: tuple, numbers: tuple, **constants) -> None:
    """Compile for pointers and numbers of these types, or of the constant None or 1, as a launch would."""
    names = list(inspect.signature(function.fn).parameters)
    given = dict(zip([name for name in names if not name.isupper()], (*pointers, *numbers), strict=True))
    signature, constexprs, attributes = {}, {}, {}
    for place, name in enumerate(names):
        kind = constants[name] if name.isupper() else given[name]
        if name.isupper() or kind is None or kind == 1:
            signature[name] = "constexpr"
            constexprs[(place,)] = kind
            continue
        signature[name] = kind
        if kind.startswith("*") or kind == "i32":
            attributes[(place,)] = [["tt.divisibility", 16]]
    compile_for(ASTSource(function, signature, constexprs, attributes), target=TARGET, options={"num_warps": 4})
    print(function.fn.__name__)


def compile_all(rank: int) -> None:
    """Compile every kernel for low-rank factors of ``rank``, 0 for none."""
    tile = {"RANK": rank, "BLOCK_R": min(64, max(16, rank)), **TYPES}
    low_rank = {**tile, **low_rank_tiles(rank, (64, 64, 128), torch.bfloat16)[1]}
    factors = (HALF, HALF) if rank else (None, None)
    numbers = (*SIZES, "fp32", "i32", 1)
    for batch in (False, True):
        compile_kernel(
            weight_kernels.row_norm_kernel, (HALF, *factors, WIDE, FULL, COUNTER, SEED if batch else None), numbers,
            NUM_PARTS=8, BATCH=batch, BLOCK_M=64, BLOCK_N=128, STAGES=3, **low_rank,
        )  # fmt: skip
    compile_kernel(
        weight_kernels.effective_weight_kernel, (HALF, *factors, FULL, FULL, HALF), numbers,
        HAS_MAGNITUDE=True, DITHER=True, BLOCK_M=32, BLOCK_N=128, STAGES=3, **low_rank,
    )  # fmt: skip
    compile_kernel(
        token_kernels.compose_kernel, (HALF, *factors, FULL, FULL, HALF, SEED if rank else None, HALF),
        (*SIZES, "fp32", "i64", "i32", "i32", 1),
        HAS_MAGNITUDE=True, HAS_BIAS=True, DROPOUT=rank > 0, BLOCK_T=32, BLOCK_N=128, STAGES=4, **low_rank,
    )  # fmt: skip
    if rank:
        compile_kernel(
            token_kernels.dropped_product_kernel, (HALF, HALF, SEED, FULL), (*SIZES, "i64", "i32", 1),
            BLOCK_T=64, BLOCK_N=128, **tile,
        )  # fmt: skip
    for full_norm in (False, True) if rank else (False,):
        finish = {"HAS_MAGNITUDE": True, "KEPT_IS_OUTPUT": not full_norm, "FULL_NORM": full_norm}
        inputs = (FULL if rank else None, FULL, FULL, HALF if full_norm else None)  # B, m, n, weight product
        results = (FULL if rank else None, FULL, HALF if full_norm else None)  # dB, dm, weighted B
        parts = (FULL if rank else None, FULL)
        compile_kernel(
            gradient_kernels.token_pass_kernel,
            (HALF, HALF if rank else None, HALF, *inputs, None, HALF, FULL, *results, COUNTER),
            (*SIZES, "fp32", "i32", "i32", 1, "i32"),
            RIGHT=rank > 0, DOT=True, GAINED=True, DROPOUT=False, FINISH=True, NUM_PARTS=4, BLOCK_T=64, BLOCK_N=64,
            STAGES=3,
            **finish, **tile,
        )  # fmt: skip
        compile_kernel(
            gradient_kernels.finish_gradients_kernel, (*parts, *inputs, *results), ("i32", "fp32"),
            NUM_PARTS=1 if rank else 0, NUM_DOT_PARTS=16, RANK=rank, BLOCK_M=8, BLOCK_R=tile["BLOCK_R"], **finish,
        )  # fmt: skip
    compile_kernel(token_kernels.finish_sum_kernel, (FULL, HALF), ("i32", "i32", "fp32"), NUM_PARTS=4, BLOCK=1024)


if __name__ == "__main__":
    for each in (0, 32):
        compile_all(each)
