"""The correlation of magnitude with direction change, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000
MIN_GROUPS = 4


@dataclass(frozen=True)
class Correlation:
    """Pearson's r with a 95 % interval; None where it is not defined."""

    r: float | None
    low: float | None
    high: float | None
    num_points: int
    num_groups: int

    def __str__(self) -> str:
        if self.r is None:
            return "not defined"
        interval = f" [{self.low:+.2f}, {self.high:+.2f}]" if self.low is not None else ""
        return f"{self.r:+.2f}{interval}"


def correlate(x: Sequence[float], y: Sequence[float], groups: Sequence[object]) -> Correlation:
    """Return Pearson's r of x and y, with a percentile bootstrap interval over groups.

    Points of one group, as a layer at several steps of a run, depend on each other, so whole groups are drawn with
    replacement, 10,000 times with a fixed seed. r needs three points that are not all alike, the interval four groups.
    """
    members: dict[object, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    points, own = np.array([x, y], dtype=np.float64), list(members.values())
    r = _pearson(points)
    if r is None or len(own) < MIN_GROUPS:
        return Correlation(r, None, None, len(x), len(own))
    # sums over each group are all that r needs: one product gives those of all resamples
    a, b = points - points.mean(1, keepdims=True)
    moments = np.stack([np.ones_like(a), a, b, a * a, b * b, a * b])
    sums = np.stack([moments[:, indices].sum(1) for indices in own])
    draws = np.random.default_rng(0).integers(len(own), size=(NUM_RESAMPLES, len(own)))
    counts = np.stack([(draws == group).sum(1) for group in range(len(own))], 1)
    n, sum_a, sum_b, aa, bb, ab = (counts @ sums).T
    spread = (aa - sum_a**2 / n) * (bb - sum_b**2 / n)
    kept = spread > 1e-12 * aa.max() * bb.max()
    values = (ab - sum_a * sum_b / n)[kept] / np.sqrt(spread[kept])
    low, high = np.quantile(np.clip(values, -1, 1), [0.025, 0.975])
    return Correlation(r, float(low), float(high), len(x), len(own))


def _pearson(points: np.ndarray) -> float | None:
    if points.shape[1] < 3 or not (points.std(1) > 0).all():
        return None
    return float(np.clip(np.corrcoef(points)[0, 1], -1, 1))
