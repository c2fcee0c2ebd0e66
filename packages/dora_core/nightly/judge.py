"""A night's measurements beside the history: one row per metric, with verdict, reason, trend and flipped examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dora_core.nightly.history import RED, History, Past, PastRun
from dora_core.nightly.measure import Measured, Measurement, Outcome
from dora_core.nightly.plan import Band, Planned
from dora_core.nightly.presence import absent_rows, check_data, differences
from dora_core.nightly.rows import ORDER, RUN, Flip, Row
from dora_core.nightly.verdict import DEFAULTS, UNITS, WITHOUT_STDERR, Comparison, Limits, compare, decide, holm


@dataclass
class _Case:
    """A measurement on its way to a verdict."""

    measurement: Measurement
    limits: Limits
    past: list[Past]
    comparison: Comparison
    flips: list[Flip] = field(default_factory=list)


def judge_night(
    history: History, night: str, planned: Sequence[Planned], measured: dict[str, Measured], broken: dict[str, str]
) -> list[Row]:
    """Return the rows of all entries, worst first, and write their verdicts into the history.

    ``measured`` and ``broken`` (reasons) are by the entry's name; an entry in neither was not run. All paired tests of
    the night are one family.
    """
    cases = {
        each.name: [_case(history, night, each, measured[each.name], one) for one in measured[each.name].measurements]
        for each in planned
        if each.name in measured
    }
    tests = [case.comparison for own in cases.values() for case in own if case.comparison.test]
    worse = dict(zip(map(id, tests), holm([each.p_worse for each in tests]), strict=True))
    better = dict(zip(map(id, tests), holm([each.p_better for each in tests]), strict=True))
    rows: list[Row] = []
    for each in planned:
        if each.name in broken:
            rows.append(Row(planned=each, metric=RUN, verdict="broken", reason=broken[each.name]))
        elif each.name not in measured:
            rows.append(Row(planned=each, metric=RUN, verdict="grey", reason="not run"))
        else:
            own = measured[each.name]
            past = history.past_runs(each.pipeline, each.entry.name, own.hardware, night)
            reference = past[-1] if past else None
            found = [_row(each, own, case, reference, worse, better) for case in cases[each.name]]
            found = check_data(history, each, own, reference, found)
            found += absent_rows(history, each, own, reference)
            notes = tuple(differences(reference, own)) if reference else ()
            found = [replace(row, measured=own, notes=notes) for row in found]
            rows += found
            history.set_verdicts(
                night,
                each.pipeline,
                each.entry.name,
                min((row.verdict for row in found), key=ORDER.index),
                {row.metric: (row.verdict, row.reason) for row in found},
            )
    return sorted(rows, key=lambda row: (ORDER.index(row.verdict), -row.severity, row.planned.name, row.metric))


def limits_of(one: Measurement, band: Band | None, hardware: str) -> Limits:
    """Return a metric's default limits with what ``nightly.yaml`` says in their place."""
    limits = DEFAULTS.get(one.metric, WITHOUT_STDERR if one.stderr is None and not one.outcomes else Limits())
    if band is None:
        return limits
    given = {name: getattr(band, name) for name in ("floor", "relative_floor", "k")}
    limits = replace(limits, **{name: value for name, value in given.items() if value is not None})
    return replace(limits, expected=band.expected.get(hardware, limits.expected))


def _case(history: History, night: str, planned: Planned, measured: Measured, one: Measurement) -> _Case:
    key = (planned.pipeline, planned.entry.name, one.metric)
    limits = limits_of(one, planned.entry.bands.get(one.metric), measured.hardware)
    if one.metric == "loss_distance" and not measured.golden:
        limits = replace(limits, expected=None)  # there is nothing that it is the distance to
    past = history.past(*key, measured.hardware, one.data_hash, night)
    usable = [each for each in past if each.verdict != RED or _at_pin(each, limits)]
    pairs: list[tuple[Outcome, Outcome]] = []
    for each in reversed(usable if one.outcomes else []):
        before = history.outcomes(each.night, *key)
        if len(before) == len(one.outcomes):
            pairs = list(zip(before, one.outcomes, strict=True))
            break
    comparison = compare(
        one.value,
        one.stderr,
        one.higher_is_better,
        [each.value for each in usable],
        [each.stderr for each in usable],
        limits,
        [(before.value, now.value) for before, now in pairs],
    )
    flips = [
        Flip(index, before, now, worse=(now.value < before.value) == one.higher_is_better)
        for index, (before, now) in enumerate(pairs)
        if before.value != now.value
    ]
    return _Case(one, limits, past, comparison, sorted(flips, key=lambda flip: not flip.worse))


def _at_pin(past: Past, limits: Limits) -> bool:
    """Whether a red value is where ``expected`` has been moved to since, and so may be compared with."""
    if limits.expected is None:
        return False
    floor = max(limits.floor, limits.relative_floor * abs(limits.expected))
    return abs(past.value - limits.expected) <= max(floor, limits.k * (past.stderr or 0.0))


def _row(
    planned: Planned,
    measured: Measured,
    case: _Case,
    reference: PastRun | None,
    worse: dict[int, float],
    better: dict[int, float],
) -> Row:
    one, comparison = case.measurement, case.comparison
    verdict, reason = decide(comparison, worse.get(id(comparison)), better.get(id(comparison)))
    if comparison.reference is None and verdict == "green" and reference is not None:
        if reference.data_hash != measured.data_hash:
            verdict, reason = "grey", f"not compared: the data are not those of night {reference.night}"
        else:
            reason = "no history: a new metric"
    if one.metric == "loss_distance":
        reason += f"; golden curve: {measured.golden or 'none but this one'}"
    severity = 0.0
    if comparison.reference is not None and math.isfinite(comparison.value):
        scale = comparison.band or comparison.floor or abs(comparison.reference) or 1.0
        severity = -math.log10(comparison.p_worse) if comparison.test else comparison.worsening / scale
    return Row(
        planned=planned,
        metric=one.metric,
        verdict=verdict,
        reason=reason,
        value=one.value,
        stderr=one.stderr,
        n=one.n,
        unit=UNITS.get(one.metric, "score"),
        reference=comparison.reference,
        band=comparison.floor if comparison.test else comparison.band,
        severity=math.inf if verdict == "red" and not math.isfinite(one.value) else severity,
        data_hash=one.data_hash,
        trend=tuple(case.past),
        flips=tuple(case.flips),
    )
