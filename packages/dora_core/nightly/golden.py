"""The loss curve that an entry's curves are compared with: pinned in a file, else the oldest of the history."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from dora_core.config import ConfigError
from dora_core.evaluation.results import replace_file
from dora_core.nightly.history import History
from dora_core.nightly.measure import Measured, Measurement, curve_distance
from dora_core.nightly.plan import Planned

FOLDER = "golden"


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A loss curve and where it is from."""

    source: str
    curve: list[tuple[int, float]]


def pinned_file(planned: Planned) -> Path:
    """Return where an entry's pinned curves are: ``golden/<entry>.json`` beside ``nightly.yaml``."""
    return planned.folder / FOLDER / f"{planned.entry.name}.json"


def find_golden(history: History, night: str, planned: Planned, measured: Measured) -> Golden | None:
    """Return the curve of the same hardware and data: the pinned one, else that of the oldest night not red."""
    path = pinned_file(planned)
    for each in _read(path) if path.is_file() else []:
        if (each["hardware"], each["data_hash"]) == (measured.hardware, measured.data_hash):
            return Golden(source=f"{FOLDER}/{path.name}, commit {each['commit']}", curve=each["curve"])
    for run in history.past_runs(planned.pipeline, planned.entry.name, measured.hardware, night):
        if run.data_hash == measured.data_hash:
            return Golden(source=f"night {run.night}", curve=run.curve)
    return None


def with_distance(golden: Golden | None, measured: Measured) -> Measured:
    """Return the run with its distance to the golden curve, if they have common steps; without a curve it is 0."""
    distance = curve_distance(measured.curve, golden.curve if golden else measured.curve)
    if distance is None:
        return measured
    one = Measurement(
        metric="loss_distance",
        value=distance,
        n=len(measured.curve),
        higher_is_better=False,
        data_hash=measured.data_hash,
    )
    return replace(measured, measurements=[*measured.measurements, one], golden=golden.source if golden else "")


def write_golden(folder: Path, planned: Planned, measured: Measured) -> None:
    """Write this run's curve, with the pinned ones of other hardware, so that copying the file pins it."""
    path = pinned_file(planned)
    own = (measured.hardware, measured.data_hash)
    kept = [each for each in (_read(path) if path.is_file() else []) if (each["hardware"], each["data_hash"]) != own]
    new = {"hardware": own[0], "data_hash": own[1], "commit": measured.commit, "curve": measured.curve}
    target = folder / FOLDER / planned.pipeline / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, [json.dumps({"curves": [*kept, new]}) + "\n"])


def _read(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["curves"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} cannot be read; it must be a file that dora nightly wrote into a night's folder {FOLDER}. Copy it "
            "again, or remove it."
        ) from None
