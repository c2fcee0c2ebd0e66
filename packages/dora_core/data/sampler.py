"""Which rows each rank takes at each optimizer step, as a function of the seed and the step alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from dora_core.config import require

MEGA_BATCH = 50
"""Rows are sorted by length inside runs of this many global batches."""


class StepPlan:
    """The order of rows for one rank; holds no cursor, so a run resumes at any step by asking for that step.

    Every row is taken once per epoch; only the last step of an epoch may take fewer than ``global_batch_size`` rows.
    The rows of a step do not depend on ``micro_batch_size``, ``world_size`` or ``rank``, which only deal them out.

    With ``lengths`` (one number per row) the rows of a step have similar lengths: each epoch is shuffled, sorted
    inside runs of 50 global batches, and the global batches are shuffled again, the one with the longest row first,
    so that a run that will exceed the memory does so at its first step.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        world_size: int = 1,
        rank: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> None:
        require(num_rows > 0, "num_rows", num_rows, "at least 1", "Give data with at least one row.")
        require(0 <= rank < world_size, "rank", rank, f"in [0, {world_size})")
        require(seed >= 0, "seed", seed, "0 or more")
        per_pass = micro_batch_size * world_size
        require(
            per_pass > 0 and global_batch_size > 0 and global_batch_size % per_pass == 0,
            "global_batch_size",
            global_batch_size,
            f"a positive multiple of micro_batch_size x world_size ({micro_batch_size} x {world_size})",
            "Change train.global_batch_size or train.micro_batch_size.",
        )
        require(
            lengths is None or len(lengths) == num_rows,
            "len(lengths)",
            None if lengths is None else len(lengths),
            f"the number of rows ({num_rows})",
        )
        self.num_rows = num_rows
        self.global_batch_size = global_batch_size
        self.accumulation = global_batch_size // per_pass
        self.steps_per_epoch = math.ceil(num_rows / global_batch_size)
        self._world_size = world_size
        self._rank = rank
        self._seed = seed
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._latest: tuple[int, np.ndarray] | None = None  # the order of the epoch asked for last; only for speed

    def num_steps(self, num_epochs: float, max_steps: int | None = None) -> int:
        """Return the optimizer steps of a run: ``max_steps`` if given, else those of ``num_epochs``, rounded up."""
        if max_steps is not None:
            return max_steps
        return math.ceil(round(num_epochs * self.steps_per_epoch, 6))  # 0.1 x 30 is 3.0000000000000004

    def rows(self, step: int) -> list[int]:
        """Return the rows of optimizer step ``step`` on all ranks together, counted from 0."""
        require(step >= 0, "step", step, "0 or more")
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.global_batch_size
        return self._order(epoch)[start : start + self.global_batch_size].tolist()

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return this rank's rows of ``step`` as exactly ``accumulation`` lists.

        The lists' sizes differ by at most one, over all ranks the ranks' totals too; at the short end of an epoch
        lists may be empty.
        """
        mine = self.rows(step)[self._rank :: self._world_size]
        size, extra = divmod(len(mine), self.accumulation)
        starts = [index * size + min(index, extra) for index in range(self.accumulation + 1)]
        return [mine[starts[index] : starts[index + 1]] for index in range(self.accumulation)]

    def _order(self, epoch: int) -> np.ndarray:
        if self._latest is None or self._latest[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            order = generator.permutation(self.num_rows)
            if self._lengths is not None:
                order = self._grouped(order, generator)
            self._latest = (epoch, order)
        return self._latest[1]

    def _grouped(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        num_full = self.num_rows // self.global_batch_size
        end = num_full * self.global_batch_size
        # the rows beyond the last full batch join the last run, where the shortest rows end up in the short batch
        starts = [*range(0, max(end, 1), MEGA_BATCH * self.global_batch_size), self.num_rows]
        for start, stop in itertools.pairwise(starts):
            run = order[start:stop]
            order[start:stop] = run[np.argsort(-self._lengths[run], kind="stable")]
        batches = order[:end].reshape(num_full, self.global_batch_size)[generator.permutation(num_full)]
        if num_full:
            longest = int(self._lengths[batches].max(axis=1).argmax())
            batches[[0, longest]] = batches[[longest, 0]]
        return np.concatenate([batches.reshape(-1), order[end:]])
