"""Which states are compared, and the rows that come out."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dora_core.adapters.stored import CONFIG_FILE
from dora_core.analysis.correlation import Correlation, correlate
from dora_core.analysis.decomposition import Change, decompose
from dora_core.analysis.weights import STEP, Weights, WeightsError, open_weights


@dataclass(frozen=True)
class State:
    """A state of a model on disk."""

    method: str
    """The name of the series that it belongs to."""
    step: int | None
    path: str


@dataclass(frozen=True)
class Point:
    """The change of one weight up to one state."""

    method: str
    step: int | None
    change: Change


def states(argument: str) -> list[State]:
    """Return what ``[NAME=]PATH`` means: a model, an adapter, a checkpoint, or all checkpoints of a run.

    A run without checkpoints is its exported adapter or model. Without a name it is the folder's, or the run's.
    """
    name, _, path = argument.rpartition("=")
    folder = Path(path)
    if not folder.is_dir():
        return [State(name or folder.name, None, path)]  # a hub name
    number = STEP.fullmatch(folder.name)
    if number:
        return [State(name or folder.parent.parent.name, int(number[1]), path)]
    if (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file():
        inside = folder.name in ("adapter", "model") and (folder.parent / "config.yaml").is_file()
        return [State(name or (folder.parent if inside else folder).name, None, path)]
    found = sorted(
        (int(match[1]), each) for each in folder.glob("checkpoints/step-*") if (match := STEP.fullmatch(each.name))
    )
    if found:
        return [State(name or folder.name, step, str(each)) for step, each in found]
    for each in (folder / "adapter", folder / "model"):
        if each.is_dir():
            return [State(name or folder.name, None, str(each))]
    raise WeightsError(
        f"{folder} is no state of a model. Give the folder of a model, an adapter, a checkpoint or a run."
    )


def measure(first: Weights, later: Sequence[State], base: str | Path | None, pattern: str | None) -> Iterator[Point]:
    """Yield the change of each weight from ``first`` to each of the later states, one weight at a time."""
    for state in later:
        for change in decompose(first, open_weights(state.path, base), pattern):
            yield Point(state.method, state.step, change)


def correlations(points: Sequence[Point]) -> dict[tuple[str, str], Correlation]:
    """Return the correlation of ΔD with ΔM over layers and steps, by method and role; layers are the groups."""
    found = {}
    for key in dict.fromkeys((point.method, point.change.role) for point in points):
        own = [point.change for point in points if (point.method, point.change.role) == key]
        found[key] = correlate([c.delta_d for c in own], [c.delta_m for c in own], [c.name for c in own])
    return found


def write_csv(points: Sequence[Point], path: Path) -> None:
    """Write a row for each point."""
    columns = ["method", "step", *(each.name for each in fields(Change))]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for point in points:
            writer.writerow({"method": point.method, "step": point.step, **asdict(point.change)})
