"""Several data sets mixed by weight, each of their rows used equally often over time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from dora_core.config import require


class Mixture:
    """What an epoch takes of each data set: ``round(weight * size)`` rows, but at least one.

    Rows are counted through all data sets: data set ``d`` has ``sizes[d]`` rows from ``sum(sizes[:d])``. It is walked
    through in an endless sequence of permutations of its rows; each epoch takes the next stretch. With weight 1 that
    is each row once per epoch, with 0.25 each row once in four epochs, with 3 each row three times per epoch. Epochs
    are a function of the arguments and the epoch alone; nothing has to be stored to resume.

    Raises ``ValueError`` for an empty data set, and for weights that are not positive, finite and one per data set.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        require(len(sizes) > 0 and min(sizes) > 0, "sizes", list(sizes), "one positive number of rows per data set")
        require(
            len(weights) == len(sizes),
            "len(weights)",
            len(weights),
            f"the number of data sets ({len(sizes)})",
            "Give each data set one weight.",
        )
        require(
            all(math.isfinite(weight) and weight > 0 for weight in weights),
            "weights",
            list(weights),
            "finite numbers above 0",
            "Leave out a data set that is not to be used.",
        )
        require(seed >= 0, "seed", seed, "0 or more")
        self.num_rows = int(sum(sizes))
        """The rows of all data sets together."""
        self.num_taken = tuple(max(1, round(weight * size)) for size, weight in zip(sizes, weights, strict=True))
        """The rows of each data set in one epoch."""
        self.epoch_size = sum(self.num_taken)
        """The rows of one epoch, those taken several times counted each time."""
        self._sizes = tuple(int(size) for size in sizes)
        self._offsets = tuple(itertools.accumulate(self._sizes, initial=0))[:-1]
        self._seed = seed

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch, counted from 0, as int64 ``[epoch_size]``: one data set after the other."""
        require(epoch >= 0, "epoch", epoch, "0 or more")
        parts = [
            offset + self._stretch(number, epoch * taken, (epoch + 1) * taken)
            for number, (offset, taken) in enumerate(zip(self._offsets, self.num_taken, strict=True))
        ]
        return np.concatenate(parts)

    def _stretch(self, number: int, start: int, stop: int) -> np.ndarray:
        """Return ``[start, stop)`` of the endless sequence of permutations of data set ``number``."""
        size = self._sizes[number]
        first, last = start // size, (stop - 1) // size
        permutations = [
            np.random.default_rng([self._seed, number, index]).permutation(size) for index in range(first, last + 1)
        ]
        return np.concatenate(permutations)[start - first * size : stop - first * size]
