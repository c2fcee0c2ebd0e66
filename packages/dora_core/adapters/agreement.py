"""Ranks that hear of each other's failures, so that none waits in a collective for one that has left.

Here, and not with the ranks' other code, because adapters save themselves and stand alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class RankFailureError(ValueError):
    """Something failed on one of the ranks; the message says on which and what."""


def agree(work: Callable[[], T] | None, gather: Callable[[Any], list[Any]], rank: int | None) -> T | None:
    """Do ``work`` on this rank and return its result; if it fails on any rank, raise ``RankFailureError`` on all.

    Every rank must call it, with None if it has nothing to do. ``gather`` returns every rank's object, by rank;
    messages name ``rank``, unless it is None.
    """
    result, failure, problem = None, None, None
    try:
        result = work() if work is not None else None
    except Exception as error:  # whatever it is, the others must hear of it before this rank leaves
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        failure, problem = error, ("" if rank is None else f"rank {rank}: ") + f"{kind}{error}"
    problems = [text for text in gather(problem) if text is not None]
    if problems:
        raise RankFailureError(problems[0]) from failure
    return result


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's object, by rank, on every rank; the own one alone without a process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(work: Callable[[], None]) -> None:
    """Do ``work`` on rank 0 alone, or without a process group here; as ``agree``, its failure raises on every rank."""
    rank = dist.get_rank() if dist.is_initialized() and dist.get_world_size() > 1 else None
    agree(None if rank else work, gather_objects, rank)
