"""Which rows each rank takes at each optimizer step, as a function of the seed and the step alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from dora_core.config import require
from dora_core.data.mixture import Mixture

MEGA_BATCH = 50
"""Rows are sorted by length inside runs of this many global batches."""


class StepPlan:
    """The order of rows for one rank; holds no cursor, so a run resumes at any step by asking for that step.

    Every row is taken once per epoch, or as often as ``mixture`` says (it must be of ``num_rows`` rows); only the last
    step of an epoch may take fewer than ``global_batch_size`` rows. The rows of a step do not depend on
    ``micro_batch_size``, ``world_size`` or ``rank``, which only deal them out.

    With ``lengths`` (one number per row) the rows of a step have similar lengths: each epoch is shuffled, sorted
    inside runs of 50 global batches, and the global batches are shuffled again, the one with the longest row first,
    so that a run that will exceed the memory does so at its first step.

    With ``groups`` (one integer per row, such as its modality) the rows of a step are of one group. What is left of
    each group, less than a global batch, comes together in mixed steps, the short one at the end of the epoch among
    them. ``lengths`` then sort inside runs of one group. If the longest row is of a group too small for a batch of its
    own, it is exchanged for one of the first step, which is then mixed too.
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
        groups: Sequence[int] | None = None,
        mixture: Mixture | None = None,
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
        if mixture is not None:
            require(mixture.num_rows == num_rows, "num_rows", num_rows, f"the mixture's ({mixture.num_rows})")
        self.num_rows = num_rows
        self.global_batch_size = global_batch_size
        self.accumulation = global_batch_size // per_pass
        self.steps_per_epoch = math.ceil((mixture.epoch_size if mixture else num_rows) / global_batch_size)
        self._world_size = world_size
        self._rank = rank
        self._seed = seed
        self._lengths = _one_per_row("lengths", lengths, num_rows)
        self._groups = _one_per_row("groups", groups, num_rows)
        self._mixture = mixture
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
        return deal(self.rows(step), self._rank, self._world_size, self.accumulation)

    def _order(self, epoch: int) -> np.ndarray:
        if self._latest is None or self._latest[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            if self._mixture is None:
                order = generator.permutation(self.num_rows)
            else:
                order = generator.permutation(self._mixture.epoch(epoch))
            if self._lengths is not None or self._groups is not None:
                order = self._in_batches(order, generator)
            self._latest = (epoch, order)
        return self._latest[1]

    def _in_batches(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return the rows in alike global batches, those in random order, and the rows that fill none at the end."""
        full, left = zip(*[self._split(rows) for rows in self._by_group(order)], strict=True)
        mixed, rest = self._split(np.concatenate(left))
        batches = np.concatenate([*full, mixed]).reshape(-1, self.global_batch_size)
        batches = batches[generator.permutation(len(batches))]
        if self._lengths is not None and len(batches):
            self._put_longest_first(batches, rest)
        return np.concatenate([batches.reshape(-1), rest])

    def _by_group(self, order: np.ndarray) -> list[np.ndarray]:
        if self._groups is None:
            return [order]
        groups = self._groups[order]
        return [order[groups == group] for group in np.unique(groups)]

    def _split(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of full global batches, of similar lengths each, and the remaining rows."""
        end = len(rows) - len(rows) % self.global_batch_size
        if self._lengths is not None:
            # the rows beyond the last full batch join the last run, where the shortest rows end up outside the batches
            starts = [*range(0, max(end, 1), MEGA_BATCH * self.global_batch_size), len(rows)]
            runs = [rows[start:stop] for start, stop in itertools.pairwise(starts)]
            rows = np.concatenate([run[np.argsort(-self._lengths[run], kind="stable")] for run in runs])
        return rows[:end], rows[end:]

    def _put_longest_first(self, batches: np.ndarray, rest: np.ndarray) -> None:
        """Exchange, in place, the first of ``batches`` ``[N, global_batch_size]`` for the one with the longest row."""
        lengths = self._lengths[batches]
        longest = int(lengths.max(axis=1).argmax())
        batches[[0, longest]] = batches[[longest, 0]]
        if len(rest) and self._lengths[rest].max() > lengths.max():
            there = int(self._lengths[rest].argmax())
            here = int(lengths[longest].argmin())
            batches[0, here], rest[there] = rest[there], batches[0, here]


def deal(rows: Sequence[int], rank: int, world_size: int, accumulation: int) -> list[list[int]]:
    """Return one rank's share of a step's ``rows`` as ``accumulation`` lists, whose sizes differ by at most one."""
    mine = list(rows[rank::world_size])
    size, extra = divmod(len(mine), accumulation)
    starts = [index * size + min(index, extra) for index in range(accumulation + 1)]
    return [mine[starts[index] : starts[index + 1]] for index in range(accumulation)]


def _one_per_row(name: str, values: Sequence[int] | None, num_rows: int) -> np.ndarray | None:
    if values is None:
        return None
    require(len(values) == num_rows, f"len({name})", len(values), f"the number of rows ({num_rows})")
    return np.asarray(values, dtype=np.int64)
