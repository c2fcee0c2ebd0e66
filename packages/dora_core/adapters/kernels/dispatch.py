"""Where the fused kernels can run, and the way to them that loads Triton only there."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from dora_core.adapters.kernels.projection import Projection, Stack

MIN_CAPABILITY = (8, 0)
SHARED_KIB = 163
"""Shared memory that a program may take: an A100's. Smaller GPUs of the same generations have 99."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_FP32_RANK = 64


@torch.compiler.assume_constant_result
def why_not_fused(device: str, dtype: torch.dtype, dropout: float = 0.0, dropout_mode: str = "lowrank") -> str | None:
    """Return why the fused kernels cannot run on tensors of ``dtype`` on a ``device`` type, or ``None`` if they can.

    With ``TRITON_INTERPRET=1`` they run on the CPU too, slowly, for tests.
    """
    return _why_not_fused(device, dtype, dropout, dropout_mode)


@cache
def _why_not_fused(device: str, dtype: torch.dtype, dropout: float, dropout_mode: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton, which they need, is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device != "cuda" and not interpreted:
        return f"they run on CUDA, not on the {device}"
    if device == "cuda" and torch.version.hip:
        return "they were never tried on ROCm"
    if device == "cuda" and (reason := _why_not_on_gpu()) is not None:
        return reason
    if dtype not in DTYPES:
        return f"they compute in bf16, fp16 and fp32, not in {str(dtype).removeprefix('torch.')}"
    if dropout > 0 and dropout_mode == "update":
        return "they have no adapter.dropout_mode update, which takes a second base product, but lowrank"
    return None


def _why_not_on_gpu() -> str | None:
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        needed, found = (".".join(map(str, version)) for version in (MIN_CAPABILITY, capability))
        return f"they need compute capability {needed} and {name} has {found}"
    shared_kib = torch.cuda.get_device_properties().shared_memory_per_block_optin // 1024
    if shared_kib < SHARED_KIB:
        return f"they need {SHARED_KIB} KiB of shared memory and {name} has {shared_kib}"
    return None


def kernel_choice(choice: str, dtypes: Iterable[torch.dtype], dropout: float, dropout_mode: str) -> str:
    """Return which kernels adapted layers with weights of ``dtypes`` will use on this machine, and why.

    Raises ``ValueError`` if the ``choice`` is fused, which cannot run here.
    """
    if choice == "plain":
        return "plain, as adapter.kernel says"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reasons = [why_not_fused(device, dtype, dropout, dropout_mode) for dtype in dtypes]
    reason = next(filter(None, reasons), None)
    if reason and choice == "fused":
        refuse(reason)
    if reason or (choice == "auto" and device == "cpu"):
        return f"plain, not the fused ones: {reason or 'they run on CUDA, not on the cpu'}"
    where = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter"
    return f"fused, on {where}; each call computes in the way that should be fastest"


def refuse(reason: str) -> None:
    """Raise the error for ``adapter.kernel: fused`` where that is impossible."""
    raise ValueError(
        f"adapter.kernel is 'fused', but the fused kernels cannot run here: {reason}. "
        "Set adapter.kernel: auto, which takes them where they can run, or plain."
    )


def fused_linears(x: Tensor, layers: Sequence[Projection] | Stack, dropout: float = 0.0) -> tuple[Tensor, ...]:
    """Return the outputs of adapted layers that share x; see ``kernels.fused.fused_linears``."""
    from dora_core.adapters.kernels import fused

    return fused.fused_linears(x, layers, dropout)


def row_norm(weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scale: float) -> Tensor:
    """Return n [out] in fp32; see ``kernels.weight_ops.row_norm``. An ordinary tensor even in inference mode."""
    from dora_core.adapters.kernels import weight_ops

    with torch.inference_mode(False), torch.no_grad():
        return weight_ops.row_norm(weight, lora_A, lora_B, scale)


def casts_factors(weight: Tensor, factor: Tensor | None) -> bool:
    """Whether the norm takes fp32 factors in the weight's half type, as the layer's products do: for large ranks.

    Tiles of fp32 then leave little room for others, and the product takes several times as long.
    """
    return factor is not None and factor.itemsize > weight.itemsize == 2 and factor.shape[1] > MAX_FP32_RANK


def row_norms(
    layers: Sequence[tuple[Tensor, Tensor | None, Tensor | None]], scale: float, addresses: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Return n [out] of several layers from W, A and B of each; see ``kernels.weight_ops.row_norms``."""
    from dora_core.adapters.kernels import weight_ops

    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(layers[0][0]):
        return weight_ops.row_norms(layers, scale, addresses).unbind()
