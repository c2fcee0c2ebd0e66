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
    """The name of the series that it belongs to; runs that differ in their seed share it."""
    run: str
    """The folder that holds the run, or the state itself."""
    step: int | None
    path: str


@dataclass(frozen=True)
class Point:
    """The change of one weight up to one state."""

    method: str
    run: str
    step: int | None
    change: Change


def states(argument: str) -> list[State]:
    """Return what ``[NAME=]PATH`` means: a model, an adapter, a checkpoint, or all checkpoints of a run.

    A run without checkpoints is its exported adapter or model. Without a name it is the folder's, or the run's.
    """
    name, _, path = argument.rpartition("=")
    folder = Path(path)
    number = STEP.fullmatch(folder.name)
    exported = folder.name in ("adapter", "model") and (folder.parent / "config.yaml").is_file()
    run = folder.parent.parent if number else folder.parent if exported else folder

    def state(step: int | None, place: Path | str) -> State:
        return State(name or run.name, str(run), step, str(place))

    if not folder.is_dir():
        return [state(None, path)]  # a hub name
    if number:
        return [state(int(number[1]), path)]
    if (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file():
        return [state(None, path)]
    steps = [(STEP.fullmatch(each.name), each) for each in sorted(folder.glob("checkpoints/step-*"))]
    if steps:
        return [state(int(match[1]), each) for match, each in steps if match]
    for each in (folder / "adapter", folder / "model"):
        if each.is_dir():
            return [state(None, each)]
    raise WeightsError(
        f"{folder} is no state of a model. Give the folder of a model, an adapter, a checkpoint or a run."
    )


def measure(first: Weights, later: Sequence[State], base: str | Path | None, pattern: str | None) -> Iterator[Point]:
    """Yield the change of each weight from ``first`` to each of the later states, one weight at a time."""
    for state in later:
        for change in decompose(first, open_weights(state.path, base), pattern):
            yield Point(state.method, state.run, state.step, change)


def correlations(points: Sequence[Point], *, within_steps: bool = False) -> dict[tuple[str, str], Correlation]:
    """Return the correlation of ΔD with ΔM over layers, steps and runs, by method and role.

    The groups that are resampled are layers of a run. Both changes grow as training goes on, which alone correlates
    them over steps: ``within_steps`` takes each step's mean away first.
    """
    found = {}
    for key in dict.fromkeys((point.method, point.change.role) for point in points):
        own = [point for point in points if (point.method, point.change.role) == key]
        values = [[getattr(p.change, name) for p in own] for name in ("delta_d", "delta_m")]
        if within_steps:
            values = [_centred(each, [(p.run, p.step) for p in own]) for each in values]
        found[key] = correlate(*values, [(p.run, p.change.name) for p in own])
    return found


def _centred(values: Sequence[float], groups: Sequence[object]) -> list[float]:
    """Return the values less the mean of their group."""
    members: dict[object, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    means = {group: sum(own) / len(own) for group, own in members.items()}
    return [value - means[group] for value, group in zip(values, groups, strict=True)]


def write_csv(points: Sequence[Point], path: Path) -> None:
    """Write a row for each point."""
    columns = ["method", "run", "step", *(each.name for each in fields(Change))]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for point in points:
            writer.writerow({"method": point.method, "run": point.run, "step": point.step, **asdict(point.change)})
