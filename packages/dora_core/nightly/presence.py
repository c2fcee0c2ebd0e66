"""What was there: the same data, every metric, the same settings and versions as in the reference run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from dora_core.nightly.history import History, PastRun
from dora_core.nightly.measure import Measured
from dora_core.nightly.plan import Planned
from dora_core.nightly.rows import DATA, Row


def differences(reference: PastRun, measured: Measured) -> Iterator[str]:
    """Yield what differs between the reference run and this one: the commit, settings by key, and versions."""
    if reference.commit != measured.commit:
        yield f"commit: {reference.commit} -> {measured.commit}"
    before, now = _flat(reference.config), _flat(measured.config)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
    for name in sorted(reference.versions.keys() | measured.versions.keys()):
        if reference.versions.get(name) != measured.versions.get(name):
            yield f"{name}: {reference.versions.get(name)} -> {measured.versions.get(name)}"


def check_data(
    history: History, planned: Planned, measured: Measured, reference: PastRun | None, rows: list[Row]
) -> list[Row]:
    """Add the row of the training data, and make scores red whose evaluation rows changed without being accepted."""
    entry = planned.entry
    verdict, reason = "green", "the data of the last runs" if reference else "no history"
    same_recipe = reference is not None and reference.config == measured.config
    if _accepted(measured.data_hash, entry.data):
        reason = "accepted in nightly.yaml"
    elif reference and reference.data_hash != measured.data_hash:
        verdict = "red" if same_recipe else "grey"
        reason = f"data changed: {reference.num_rows} rows before, {measured.num_rows} now"
        reason += "" if same_recipe else "; so did the recipe"
    row = Row(
        planned=planned,
        metric=DATA,
        verdict=verdict,
        reason=f"{reason} (sha256 {measured.data_hash[:12]})",
        value=measured.num_rows,
        unit="training rows",
        reference=reference.num_rows if reference else None,
        severity=math.inf,
        data_hash=measured.data_hash,
    )
    before = history.metrics_of(reference.night, planned.pipeline, entry.name) if reference else {}
    hashes = {one.metric: one.evaluation_hash for one in measured.measurements}
    changed = []
    for each in rows:
        old_hash, old_n = before.get(each.metric, ("", 0))
        new_hash = hashes[each.metric]
        if old_hash and old_hash != new_hash:
            accepted = _accepted(new_hash, entry.data) or not same_recipe
            reason = f"evaluation rows changed: {old_n} before, {each.n} now (sha256 {new_hash[:12]})"
            each = replace(each, verdict="grey" if accepted else "red", reason=reason, severity=math.inf)
        changed.append(each)
    return [row, *changed]


def absent_rows(history: History, planned: Planned, measured: Measured, reference: PastRun | None) -> Iterator[Row]:
    """Yield metrics that the reference run has or that have a band, and that this run did not measure."""
    entry = planned.entry
    now = {one.metric for one in measured.measurements}
    before = set(history.metrics_of(reference.night, planned.pipeline, entry.name)) if reference else set()
    for metric in sorted(before - now - set(entry.retired)):
        reason = f"missing: night {reference.night} measured it. Repair the run, or list it under retired"
        yield Row(planned=planned, metric=metric, verdict="red", reason=reason, severity=math.inf)
    for metric in sorted(set(entry.bands) - now - before):
        yield Row(planned=planned, metric=metric, verdict="grey", reason="has a band and is not measured here")


def _accepted(data_hash: str, accepted: Sequence[str]) -> bool:
    return any(data_hash.startswith(each) for each in accepted)


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {path: values}
    return {
        key: leaf for name, value in values.items() for key, leaf in _flat(value, f"{path}.{name}".strip(".")).items()
    }
