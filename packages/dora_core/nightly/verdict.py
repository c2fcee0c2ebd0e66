"""Red, yellow or green: the statistics of a comparison. Pure functions, no files.

Two ways, by what there is. With the same examples scored on both nights: a paired test, exact McNemar where an example
is right or wrong (McNemar 1947; the binomial form), else a paired bootstrap of the mean difference (Efron and
Tibshirani 1993, ch. 16). Without: the change against a band, max(floor, k x stderr). All paired tests of a night are
one family: their p-values, one-sided in each direction, are adjusted by Holm's method (1979), so that the chance of any
false red among them is at most ``FAMILY_LEVEL`` a night when nothing has changed. Bands are not tests and not adjusted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

FAMILY_LEVEL = 0.01
"""Chance of any red among the paired tests of a night in which nothing has changed; the same for yellow."""
NUM_RESAMPLES = 20_000
NUM_REFERENCES = 10
"""The reference is the median of this many newest nights at most."""
NUM_FOR_SPREAD = 3
"""From this many nights on, the standard deviation between them counts as a standard error."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A band's parameters, as they apply to one metric on one hardware."""

    floor: float = 0.0
    relative_floor: float = 0.0
    k: float = 4.0
    expected: float | None = None


DEFAULTS = {
    "loss_distance": Limits(floor=0.02, k=0.0, expected=0.0),  # a golden curve stands still
    "tokens_per_s": Limits(relative_floor=0.2),
    "data_wait": Limits(floor=0.05),
    "peak_gib": Limits(relative_floor=0.05),
    "exported_values": Limits(k=0.0),
}
"""Bands of metrics that are no scores; a score's is k standard errors."""
WITHOUT_STDERR = Limits(relative_floor=0.1)
"""The band of a score that has no standard error, such as BLEU."""
UNITS = {
    "loss_distance": "root mean square difference of log losses",
    "tokens_per_s": "tokens/s",
    "data_wait": "share of time",
    "peak_gib": "GiB",
    "exported_values": "numbers",
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A value beside its reference, before the family of tests is known."""

    value: float
    reference: float | None
    """None: there is no history, and nothing is compared."""
    band: float = 0.0
    higher_is_better: bool
    test: str = ""
    """``McNemar``, ``bootstrap``, or empty where the band decides."""
    p_worse: float | None = None
    p_better: float | None = None
    floor: float = 0.0
    """A smaller change is green whatever the test says."""

    @property
    def worsening(self) -> float:
        """By how much the value is worse than the reference, negative if it is better."""
        change = self.value - self.reference
        return -change if self.higher_is_better else change


def compare(
    value: float,
    stderr: float | None,
    higher_is_better: bool,
    references: Sequence[float],
    reference_stderrs: Sequence[float | None],
    limits: Limits,
    pairs: Sequence[tuple[float, float]] = (),
) -> Comparison:
    """Return the comparison of a value with its earlier values, newest last, or with the pinned one.

    ``pairs`` are the examples' outcomes, before and now. With them the test decides and the reference is the paired
    night's own mean, unless the value is outside the band around its pin.
    """
    recent = list(references)[-NUM_REFERENCES:]
    known = [each for each in list(reference_stderrs)[-NUM_REFERENCES:] if each is not None]
    if limits.expected is not None:
        reference = limits.expected
    elif recent:
        reference = statistics.median(recent)
    else:
        return Comparison(value=value, reference=None, higher_is_better=higher_is_better)
    floor = max(limits.floor, limits.relative_floor * abs(reference))
    spread = statistics.stdev(recent) if len(recent) >= NUM_FOR_SPREAD else 0.0
    noise = max([stderr or 0.0, spread, statistics.median(known) if known else 0.0])
    band = max(floor, limits.k * noise)
    plain = Comparison(value=value, reference=reference, band=band, floor=floor, higher_is_better=higher_is_better)
    drifted = limits.expected is not None and abs(value - limits.expected) > band
    if not pairs or drifted or not math.isfinite(value):
        return plain
    signed = [(now - before) if higher_is_better else (before - now) for before, now in pairs]
    if all(outcome in (0.0, 1.0) for pair in pairs for outcome in pair):
        num_worse, num_better = sum(each < 0 for each in signed), sum(each > 0 for each in signed)
        test, p_worse, p_better = "McNemar", mcnemar(num_worse, num_better), mcnemar(num_better, num_worse)
    else:
        test, p_worse, p_better = "bootstrap", paired_bootstrap([-each for each in signed]), paired_bootstrap(signed)
    return Comparison(
        value=value,
        reference=math.fsum(before for before, _ in pairs) / len(pairs),
        floor=floor,
        higher_is_better=higher_is_better,
        test=test,
        p_worse=p_worse,
        p_better=p_better,
    )


def decide(comparison: Comparison, p_worse: float | None, p_better: float | None) -> tuple[str, str]:
    """Return verdict and reason; the p-values are the comparison's after Holm."""
    if not math.isfinite(comparison.value):
        return "red", "not finite"
    if comparison.reference is None:
        return "green", "no history"
    worsening = comparison.worsening
    if comparison.test:
        said = f"{comparison.test}, Holm-adjusted p"
        if p_worse <= FAMILY_LEVEL and worsening > comparison.floor:
            return "red", f"worse: {said} {p_worse:.2g}"
        if p_better <= FAMILY_LEVEL and -worsening > comparison.floor:
            return "yellow", f"better than is likely: {said} {p_better:.2g}"
        return "green", f"{said} {min(p_worse, p_better):.2g}"
    said = f"by {abs(worsening):.4g}, band {comparison.band:.4g}"
    if worsening > comparison.band:
        return "red", f"worse {said}"
    if -worsening > comparison.band:
        return "yellow", f"better {said}"
    return "green", f"{'worse' if worsening > 0 else 'better' if worsening < 0 else 'equal,'} {said}"


def mcnemar(num_first: int, num_second: int) -> float:
    """Return the exact one-sided p-value P(X >= num_first), X ~ Binomial(num_first + num_second, 1/2)."""
    total = num_first + num_second
    tail, term = 0, math.comb(total, num_first)
    for count in range(num_first, total + 1):  # from each binomial coefficient to the next: exact, and soon done
        tail += term
        term = term * (total - count) // (count + 1)
    return float(Fraction(tail, 2**total))


def paired_bootstrap(differences: Sequence[float], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> float:
    """Return the one-sided p-value of a mean difference above 0 by resampling the differences around their mean.

    (1 + number of resampled means as high as the observed) / (1 + resamples), so that it is never 0. The seed is
    fixed: the same night has the same verdicts.
    """
    values = np.asarray(differences, dtype=np.float64)
    observed = values.mean()
    if observed <= 0:
        return 1.0
    generator = np.random.default_rng(seed)
    centred = values - observed
    num_high = 0
    chunk = max(1, 2_000_000 // len(values))  # 16 MB at a time
    for start in range(0, num_resamples, chunk):
        size = (min(chunk, num_resamples - start), len(values))
        means = centred[generator.integers(0, len(values), size)].mean(axis=1)
        num_high += int((means >= observed * (1 - 1e-12)).sum())
    return (1 + num_high) / (1 + num_resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values: reject those at most the level, and the family-wise error is at most it."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted
