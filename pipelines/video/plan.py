"""Which rows of which task each rank takes at each optimizer step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from dora_core.config import require
from dora_core.data.sampler import StepPlan, deal


class TaskPlan:
    """Every batch of every task once an epoch, in an order that a seed decides and all ranks share.

    A step's rows are of one task: ``batch_sizes[task]`` of them on all ranks together, fewer in a task's last batch of
    an epoch. Rows are counted through all tasks. Like a ``StepPlan`` it holds no cursor. What it deals out are draws,
    not rows: ``epoch * num_rows + row``, so that a row may have another target in each epoch.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_sizes: Sequence[int],
        *,
        accumulation: int,
        seed: int,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        require(0 <= rank < world_size, "rank", rank, f"in [0, {world_size})")
        self.num_rows = sum(sizes)
        self.accumulation = accumulation
        self._offsets = list(itertools.accumulate(sizes, initial=0))
        self._plans = [
            StepPlan(num_rows=size, global_batch_size=batch, micro_batch_size=batch, seed=seed + 7919 * number)
            for number, (size, batch) in enumerate(zip(sizes, batch_sizes, strict=True))
        ]
        self.steps_per_epoch = sum(plan.steps_per_epoch for plan in self._plans)
        self._seed = seed
        self._world_size = world_size
        self._rank = rank

    def num_steps(self, num_epochs: float, max_steps: int | None = None) -> int:
        """Return the optimizer steps of a run: ``max_steps`` if given, else those of ``num_epochs``, rounded up."""
        return math.ceil(round(num_epochs * self.steps_per_epoch, 6)) if max_steps is None else max_steps

    def task(self, step: int) -> int:
        """Return the number of the task of ``step``."""
        return self._place(step)[1]

    def rows(self, step: int) -> list[int]:
        """Return the draws of optimizer step ``step``, counted from 0, on all ranks together."""
        epoch, task, batch = self._place(step)
        plan = self._plans[task]
        first = epoch * self.num_rows + self._offsets[task]
        return [first + row for row in plan.rows(epoch * plan.steps_per_epoch + batch)]

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return this rank's draws of ``step`` as exactly ``accumulation`` lists, some of which may be empty."""
        return deal(self.rows(step), self._rank, self._world_size, self.accumulation)

    def _place(self, step: int) -> tuple[int, int, int]:
        """Return the epoch, the task, and which of the task's batches in that epoch a step is."""
        require(step >= 0, "step", step, "0 or more")
        epoch, within = divmod(step, self.steps_per_epoch)
        tasks = np.repeat(np.arange(len(self._plans)), [plan.steps_per_epoch for plan in self._plans])
        order = np.random.default_rng([self._seed, epoch]).permutation(tasks)
        task = int(order[within])
        return epoch, task, int((order[:within] == task).sum())
