"""Entries, runs and nights made up for tests of what judges and reports them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_core.nightly.history import History
from dora_core.nightly.judge import judge_night
from dora_core.nightly.measure import Measured, Measurement, Outcome
from dora_core.nightly.plan import Entry, Planned

DATA = "d" * 64


@pytest.fixture
def history(tmp_path):
    opened = History(tmp_path / "history.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def planned(tmp_path):
    """Return a maker of entries of a pipeline ``toy`` whose folder is in ``tmp_path``."""

    def make(**fields) -> Planned:
        entry = Entry(**{"name": "tiny", "recipe": "tiny", "time_limit_s": 60.0, **fields})
        folder = tmp_path / "pipelines" / "toy"
        return Planned(pipeline="toy", entry=entry, folder=folder, script=folder / "train.py")

    return make


@pytest.fixture
def measurement():
    """Return a maker of scores, with examples if ``outcomes`` are given."""

    def make(value=None, metric="toy/quiz:accuracy", outcomes=(), evaluation="e", data=DATA, **fields) -> Measurement:
        rows = [Outcome(float(each), f"question {i}", "right", f"said {each}") for i, each in enumerate(outcomes)]
        value = sum(map(float, outcomes)) / len(outcomes) if value is None else value
        own = {"n": len(rows) or 1, "higher_is_better": True, "data_hash": f"{data}+{evaluation}"}
        return Measurement(metric=metric, value=value, evaluation_hash=evaluation, outcomes=rows, **{**own, **fields})

    return make


@pytest.fixture
def measured():
    """Return a maker of finished runs."""

    def make(*measurements: Measurement, **fields) -> Measured:
        defaults = {
            "hardware": "a processor, 2 CPUs, 1 ranks",
            "commit": "c" * 40,
            "versions": {"python": "3.11.7", "torch": "2.14.1"},
            "config": {"train": {"lr": 0.001}},
            "config_hash": "f" * 64,
            "data_hash": DATA,
            "num_rows": 100,
            "curve": [(1, 2.0), (2, 1.5), (3, 1.0)],
        }
        return Measured(**{**defaults, **fields}, measurements=list(measurements))

    return make


@pytest.fixture
def judge(history):
    """Return a function that adds one run as a night of its own and returns the night's rows by metric."""
    nights: list[str] = []

    def add(planned: Planned, run: Measured) -> dict:
        night = f"2026-01-{len(nights) + 1:02d}"
        nights.append(night)
        history.add_run(night, f"{night}T03:00:00", planned.pipeline, planned.entry.name, run)
        return {row.metric: row for row in judge_night(history, night, [planned], {planned.name: run}, {})}

    return add


@pytest.fixture
def write_plan():
    """Return a function that writes a ``nightly.yaml`` into a folder and returns its path."""

    def write(folder: Path, text: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "nightly.yaml").write_text(text)
        return folder / "nightly.yaml"

    return write
