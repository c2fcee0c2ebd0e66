"""ZeRO-3 partitions: the only file of the adapters that knows them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 holds this parameter in partitions."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, partitioned or not."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def full_numel(parameter: Tensor) -> int:
    """Return the number of elements of the whole parameter, partitioned or not."""
    return full_shape(parameter).numel()


def gathered(parameters: Iterable[Tensor], *, modify: bool = False) -> AbstractContextManager[None]:
    """Hold the whole of each parameter within the block. Every rank must enter it.

    With ``modify``, what rank 0 has written reaches all ranks at the end of the block.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None)


def copy_local_part(parameter: Tensor) -> Tensor:
    """Return a CPU copy of what this rank holds of the parameter: its partition, or all of it."""
    return (parameter.ds_tensor if is_partitioned(parameter) else parameter).detach().to("cpu", copy=True)


@torch.no_grad()
def restore_local_part_(parameter: Tensor, part: Tensor) -> None:
    """Write back what ``copy_local_part`` returned. Every rank must call it."""
    if is_partitioned(parameter):
        parameter.partition()  # let go of a gathered copy, which would hide the restored partition
        parameter.ds_tensor.copy_(part)
    else:
        parameter.copy_(part)
