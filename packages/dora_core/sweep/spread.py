"""Means, spreads and intervals over the seeds of a sweep, and over the questions where there is one seed."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_core.evaluation.results import PREDICTIONS_FILE, Metric

NORMAL_QUANTILE = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A few values in one line; the standard deviation divides by n - 1 and is None for a single value."""

    n: int
    mean: float
    sd: float | None
    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean of paired differences with its 95 % interval, or why there is none."""

    n: int
    """Number of pairs of runs."""
    mean: float
    low: float | None = None
    high: float | None = None
    interval: str
    """What the interval is over, or why there is none."""


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of at least one value."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(n=len(values), mean=statistics.fmean(values), sd=sd, min=min(values), max=max(values))


def t_quantile(degrees: int) -> float:
    """Return the t that a Student variable of so many degrees of freedom exceeds in size with probability 0.05.

    Solves Abramowitz and Stegun's 26.7.3 and 26.7.4, the closed forms for whole degrees, by bisection.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, degrees) < 0.95 else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _t_inside(angle: float, degrees: int) -> float:
    """Return P(|T| < tan(angle) sqrt(degrees))."""
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))


def difference_over_seeds(differences: Sequence[float]) -> Difference:
    """Return the mean of differences between runs of equal seed with its t interval; of two or more."""
    found = spread(differences)
    half = t_quantile(found.n - 1) * found.sd / math.sqrt(found.n)
    return Difference(
        n=found.n, mean=found.mean, low=found.mean - half, high=found.mean + half, interval=f"t, over {found.n} seeds"
    )


def difference_over_questions(first: tuple[Metric, Path], second: tuple[Metric, Path]) -> Difference:
    """Return second minus first of one seed, each a metric and its results folder, with an interval over questions.

    The questions of each benchmark are pairs, and the interval is the normal one of the unweighted mean over the
    benchmarks. There is none if the questions differ, or if a metric is no mean over its questions.
    """
    mean = second[0].value - first[0].value
    if first[0].dataset_hash != second[0].dataset_hash:
        return Difference(n=1, mean=mean, interval="none: the runs were scored on different rows")
    outcomes = [question_outcomes(*each) for each in (first, second)]
    if None in outcomes:
        return Difference(n=1, mean=mean, interval="none: one seed, and the metric is no mean over questions")
    parts = [
        [after - before for before, after in zip(outcomes[0][task], outcomes[1][task], strict=True)]
        for task in outcomes[0]
    ]
    if min(map(len, parts)) < 2:
        return Difference(n=1, mean=mean, interval="none: one seed, and a benchmark of one question")
    half = NORMAL_QUANTILE * math.sqrt(sum(statistics.variance(part) / len(part) for part in parts)) / len(parts)
    interval = f"normal, over {sum(map(len, parts))} questions; one seed"
    return Difference(n=1, mean=mean, low=mean - half, high=mean + half, interval=interval)


def question_outcomes(metric: Metric, folder: Path) -> dict[str, list[float]] | None:
    """Return each benchmark's outcomes by question, or None unless their unweighted mean is the metric's value."""
    outcomes: dict[str, list[float]] = defaultdict(list)
    parts = metric.extra.get("parts", [metric.name])
    for line in (folder / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("task") in parts:
            outcome = row.get("score", row.get("correct"))
            if not isinstance(outcome, bool | int | float):
                return None
            outcomes[row["task"]].append(float(outcome))
    if outcomes.keys() != set(parts):
        return None
    mean = statistics.fmean(map(statistics.fmean, outcomes.values()))
    return dict(outcomes) if math.isclose(mean, metric.value, abs_tol=1e-9) else None
