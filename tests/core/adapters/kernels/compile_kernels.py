"""Compile what fused layers launch for a GPU that need not be there; prints names and bytes of shared memory.

Layers of several types and ranks go forward and backward on the CPU with kernels that are compiled and not run.
"""

from __future__ import annotations

import inspect
import itertools

import torch
from fused_cases import make
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_for

from dora_core.adapters.kernels import row_norm
from dora_core.adapters.kernels.launch import Launch
from dora_core.adapters.kernels.weight_ops import row_norms

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
BF16, FP32 = torch.bfloat16, torch.float32
CASES = ((BF16, BF16, 32), (BF16, FP32, 64), (FP32, FP32, 64), (BF16, BF16, 384), (FP32, FP32, 128), (BF16, BF16, 0))
"""Types of the layer and of its adapter, and ranks."""
done: set[str] = set()


def compile_launch(launch: Launch, *tensors: Tensor | None) -> None:
    """Compile as Triton would for this launch: integers that are 1 or multiples of 16 are so in the code."""
    function = launch._function
    signature, constants, attributes = {}, {}, {}
    for place, (name, value) in enumerate(
        zip(inspect.signature(function.fn).parameters, (*tensors, *launch._numbers), strict=True)
    ):
        if name.isupper() or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
            continue
        signature[name] = {int: "i64" if isinstance(value, int) and value >= 2**31 else "i32", float: "fp32"}.get(
            type(value)
        ) or POINTERS[value.dtype]
        if not isinstance(value, float) and (isinstance(value, Tensor) or value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    key = f"{function.fn.__name__} {signature} {constants} {attributes}"
    if key not in done:
        done.add(key)
        source = ASTSource(function, signature, constants, attributes)
        compiled = compile_for(source, target=TARGET, options={"num_warps": 4})
        print(function.fn.__name__, compiled.metadata.shared, flush=True)


def call_layers() -> None:
    """Forward and backward, in all forms."""
    for (dtype, adapter_dtype, rank), form in itertools.product(CASES, ("merged", "composed", "dense")):
        full_norm, dropout = form == "dense" and rank > 0, False
        if form == "composed" and rank in (64, 384):
            full_norm, dropout = rank == 384, True
        case = make(512, 768, 1024, rank, dtype=dtype, adapter_dtype=adapter_dtype, bias=rank == 32)
        y = case.fused(form, full_norm=full_norm, dropout=0.1 * dropout)
        y.backward(torch.ones_like(y))
        factors = [None if factor is None else factor.detach() for factor in (case.lora_A, case.lora_B)]
        row_norm(case.weight, *factors, case.scale)
    row_norms([(case.weight, None, None)] * 2, 1.0, (16, 0, 0, 32, 0, 0))


if __name__ == "__main__":
    Launch.__call__ = compile_launch
    call_layers()
