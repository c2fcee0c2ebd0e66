"""Launching Triton kernels at little cost: a training step launches hundreds of them, each for tens of microseconds."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NUM_PROGRAMS = 528
"""Programs that keep a large GPU busy: four for each of 132 processors; a constant, for the same bits everywhere."""
MAX_KNOWN = 4096
"""Launches that an operator remembers; batches of ever new lengths would make ever more."""
_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


class Kernel:
    """A Triton kernel whose parameters are pointers, then numbers, then constants (in capitals)."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self._constants = [name for name in inspect.signature(function.fn).parameters if name.isupper()]

    def bind(self, grid: tuple[int, int, int], numbers: tuple, **constants: Any) -> Launch:
        """Return a launch of ``grid`` programs that lacks its tensors alone."""
        return Launch(self, grid, (*numbers, *[constants[name] for name in self._constants]))


class Launch:
    """Launches a kernel on tensors, always of the same types, on their device, which must be the current one.

    Triton looks at every argument of every launch to find the code that was compiled for its like. Here that is done
    once, for numbers that stay as they are and for tensors that begin at multiples of 16 bytes; what was compiled is
    then launched directly.
    """

    def __init__(self, kernel: Kernel, grid: tuple[int, int, int], numbers: tuple) -> None:
        self._function, self._grid, self._numbers = kernel.function, grid, numbers
        self._known: dict[int, tuple] = {}
        """By device: how to launch what was compiled for it, and with what."""

    def __call__(self, *tensors: Tensor | None) -> None:
        if INTERPRETED:
            self._function[self._grid](*tensors, *self._numbers)
            return
        addresses, bits = [], 0
        for tensor in tensors:
            address = None if tensor is None else tensor.data_ptr()
            addresses.append(address)
            bits |= address or 0
        device = torch._C._cuda_getDevice()
        known = self._known.get(device) if not bits & 15 else None
        if known is not None:
            # What Triton's own launch ends in, without the hooks of its profiler, which cost more than the launch, and
            # with addresses: of a tensor it would ask the driver whether the device can reach it.
            stream = torch._C._cuda_getCurrentRawStream(device)
            run, *handles = known
            run(*self._grid, stream, *handles, *addresses, *self._numbers)
            return
        compiled = self._function[self._grid](*tensors, *self._numbers, num_warps=4)
        if not bits & 15:
            self._known[device] = (compiled.run, compiled.function, compiled.packed_metadata, None, None, None)


def operand(*dtypes: torch.dtype) -> dict[str, Any]:
    """Return the type that ``tl.dot`` multiplies in; fp32 in three TF32 products, which keep its precision."""
    dtype = dtypes[0] if len(set(dtypes)) == 1 else torch.float32
    if INTERPRETED and dtype == torch.bfloat16:  # which the interpreter cannot multiply
        dtype = torch.float32
    return {
        "OPERAND": _DTYPES[dtype],
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def split(length: int, block: int, num_others: int, num_programs: int | None) -> tuple[int, int]:
    """Return parts of ``length``, of whole blocks, for about ``num_programs`` programs in all; and a part's length.

    Without ``num_programs`` every block is a part.
    """
    parts = cdiv(length, block)
    if num_programs is not None:
        parts = min(num_programs // max(1, num_others), parts)
    parts = max(1, parts)
    per_part = cdiv(cdiv(max(1, length), parts), block) * block
    return cdiv(max(1, length), per_part), per_part


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an uninitialised tensor on the device of another."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def cdiv(length: int, block: int) -> int:
    """Return how many blocks cover a length."""
    return -(-length // block)


def rank_block(rank: int, most_at_once: int = 64) -> int:
    """Return the width of the tiles that a rank is taken in, a power of two that ``tl.dot`` can multiply.

    Up to the rank ``most_at_once`` it is one tile, above tiles of 64.
    """
    return 64 if rank > most_at_once else max(16, 1 << max(0, rank - 1).bit_length())


def low_rank_tiles(rank: int, blocks: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, dict[str, Any]]:
    """Return how many rows a tile of a low-rank product has, and the constants WALK and BLOCK_R.

    Up to rank 64 a program walks along a row of tiles, so that loads overlap with work; above, it has one tile, and
    above rank 128 it takes the rank in steps. The three cases have their ``blocks`` of rows; the last, for factors
    of four bytes, is the second.
    """
    case = (rank > 64) + (rank > 128)
    block = blocks[min(case, 1) if dtype == torch.float32 else case]
    return block, {"WALK": case == 0, "BLOCK_R": rank_block(rank, 128)}


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a tensor, if any, in ``dtype``."""
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor, if any, with its rows one after the other."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


_counters: dict[tuple, Tensor] = {}
_scratch: dict[tuple, Tensor] = {}


def counters(device: torch.device, number: int) -> Tensor:
    """Return zeros for ``comes_last``, which leaves them so: a tensor for each stream, whose kernels run in turn."""
    place = _stream(device)
    found = _counters.get(place)
    if found is None or found.numel() < number:
        found = _counters[place] = torch.zeros(max(1024, number), dtype=torch.int32, device=device)
    return found


def scratch(device: torch.device, number: int) -> Tensor:
    """Return fp32 memory that a single launch may write and read: always the same for each stream, or a larger one."""
    place = _stream(device)
    found = _scratch.get(place)
    if found is None or found.numel() < number:
        found = _scratch[place] = torch.empty(number, dtype=torch.float32, device=device)
    return found


def _stream(device: torch.device) -> tuple[torch.device, int]:
    return device, torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def dropout_threshold(dropout: float) -> int:
    """Return which of 2^32 numbers drop an element."""
    return round(dropout * 2**32)


def with_unit_stride(matrix: Tensor | None) -> Tensor | None:
    """Return the matrix, if any, with adjacent columns next to each other."""
    return matrix if matrix is None or matrix.stride(1) == 1 else matrix.contiguous()


def facts(tensor: Tensor | None) -> tuple:
    """Return what a launch must know of an optional matrix: shape, strides and type."""
    return ((), (0, 0), None) if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def dtype_of(tensor: Tensor | None) -> torch.dtype | None:
    """Return the type of an optional tensor."""
    return None if tensor is None else tensor.dtype
