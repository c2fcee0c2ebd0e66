"""Deliver the batches of each optimizer step, in the order of a plan."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from dora_core.config import require
from dora_core.data.collate import Batch
from dora_core.data.sampler import StepPlan


class StepLoader:
    """Iterate over the optimizer steps ``[start_step, end_step)``, each a list of ``plan.accumulation`` batches.

    ``collate`` makes a batch of a list of rows and must accept an empty list. With ``num_workers`` > 0 it runs in
    other processes that prepare batches ahead, so it must be picklable and must not touch CUDA; the batches and their
    order are the same for any number of workers. Batches stay on the CPU, pinned if this process has a GPU. Iterating
    draws nothing from torch's global random state, so a resumed run sees the same dropout.
    """

    def __init__(
        self,
        plan: StepPlan,
        rows: Sequence[Any],
        collate: Callable[[list[Any]], Batch],
        *,
        end_step: int,
        start_step: int = 0,
        num_workers: int = 0,
    ) -> None:
        require(len(rows) == plan.num_rows, "len(rows)", len(rows), f"the plan's number of rows ({plan.num_rows})")
        require(0 <= start_step <= end_step, "start_step", start_step, f"in [0, end_step] with end_step {end_step}")
        require(num_workers >= 0, "num_workers", num_workers, "0 or more", "Change data.num_workers.")
        self.plan = plan
        self.start_step = start_step
        self.end_step = end_step
        self._loader = batch_loader(rows, _MicroBatches(plan, start_step, end_step), collate, num_workers)

    def __len__(self) -> int:
        """Return the number of steps."""
        return self.end_step - self.start_step

    def __iter__(self) -> Iterator[list[Batch]]:
        batches = iter(self._loader)
        for _ in range(len(self)):
            yield [next(batches) for _ in range(self.plan.accumulation)]


def batch_loader(
    rows: Sequence[Any], batches: Iterable[list[int]], collate: Callable[[list[Any]], Batch], num_workers: int
) -> DataLoader:
    """Return a loader of the given batches of row numbers, which may be empty, as ``StepLoader`` prepares them."""
    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_run,
        generator=torch.Generator().manual_seed(0),  # only seeds the workers, which draw nothing
    )


def _leave_signals_to_the_run(worker: int) -> None:
    # Launchers signal every process. A worker that died of it would take the run along before it can save; workers end
    # with the process they work for.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class _MicroBatches:
    """The lists of rows of every micro-batch, step after step."""

    def __init__(self, plan: StepPlan, start_step: int, end_step: int) -> None:
        self._plan = plan
        self._steps = range(start_step, end_step)

    def __len__(self) -> int:
        return len(self._steps) * self._plan.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            yield from self._plan.micro_batches(step)
