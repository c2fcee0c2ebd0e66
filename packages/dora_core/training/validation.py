"""Losses and counts over rows that are not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from dora_core.data.collate import Batch
from dora_core.data.loader import batch_loader
from dora_core.engine.build import Engine


@torch.no_grad()
def sum_over_rows(
    engine: Engine,
    rows: Sequence[Any],
    collate: Callable[[list[Any]], Batch],
    measure: Callable[[Batch], Sequence[float | Tensor]],
    batch_size: int,
    num_workers: int = 0,
) -> list[float]:
    """Return the sums of ``measure(batch)`` over all ``rows``, such as a summed loss and the number of its targets.

    The rows are split over the ranks, and every rank must call it. Every rank measures the same number of batches,
    empty ones where it has no rows left, so ``measure`` may run the engine in any ZeRO stage. The model is in
    evaluation mode meanwhile. ``batch_size`` and ``num_workers`` are those of ``StepLoader``.
    """
    world = engine.world
    share = Subset(rows, range(world.rank, len(rows), world.size))
    places = range(len(share))
    longest = math.ceil(len(rows) / world.size)
    batches = [list(places[start : start + batch_size]) for start in range(0, max(longest, 1), batch_size)]
    with engine.evaluating():
        measured = [measure(batch) for batch in batch_loader(share, batches, collate, num_workers)]
    return world.sum([sum(map(float, column)) for column in zip(*measured, strict=True)])
