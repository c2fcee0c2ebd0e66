"""What a sweep leaves: ``sweep.json``, ``table.md`` and ``sweep.png``, made of its runs' folders alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dora_core.config import ConfigError
from dora_core.evaluation.results import Metric, read_results, replace_file
from dora_core.sweep.grid import Grid, Point
from dora_core.sweep.runs import Outcome, read_outcome, results_folder
from dora_core.sweep.spread import Difference, Spread, difference_over_questions, difference_over_seeds, spread
from dora_core.training.metrics import plot_curves, read_metrics

SCHEMA = 1


@dataclass(frozen=True)
class Scored:
    """A run of the grid with what it has left."""

    point: Point
    folder: Path
    outcome: Outcome
    metrics: list[Metric]
    """Empty unless the run is finished."""
    metric: Metric | None
    """The one that the sweep is about."""

    def at(self, keys: Sequence[str]) -> tuple[Any, ...]:
        """Return the values of some swept fields, ready to be compared."""
        return tuple(json.dumps(self.point.settings[key]) for key in keys)


def collect(grid: Grid, output: Path, name: str | None) -> list[Scored]:
    """Return the runs of a grid, each with the metric called ``name``, the last of its results if None.

    Raises ``ConfigError`` if a finished run has no such metric.
    """
    runs = []
    for point in grid.points:
        folder = output / point.name
        outcome = read_outcome(folder)
        metrics = read_results(results_folder(folder)) if outcome.status == "finished" else []
        metric = find_metric(metrics, name) if metrics else None
        runs.append(Scored(point, folder, outcome, metrics, metric))
    return runs


def find_metric(metrics: Sequence[Metric], name: str | None) -> Metric:
    """Return a metric by ``llm/boolq``, ``boolq`` or, of several that an evaluator has, ``boolq:accuracy``."""
    if name is None:
        return metrics[-1]
    wanted, _, kind = name.partition(":")
    for metric in metrics:
        if wanted in (metric.name, metric.name.partition("/")[2]) and kind in ("", metric.metric):
            return metric
    known = ", ".join(dict.fromkeys(f"{metric.name}:{metric.metric}" for metric in metrics))
    raise ConfigError(f"--metric is {name!r}; the results have {known}. Give one of these, or leave --metric out.")


def write_report(grid: Grid, runs: Sequence[Scored], output: Path, about: dict[str, Any]) -> str:
    """Write the files of a sweep into ``output`` and return the table. ``about`` goes into ``sweep.json`` as it is."""
    scored = [run for run in runs if run.metric is not None]
    settings = _settings(grid, runs)
    pairs = _pairs(grid, runs)
    document = {
        "schema": SCHEMA,
        **about,
        "fields": {key: grid.values(key) for key in grid.points[0].settings},
        "seeds": list(grid.seeds),
        "overrides": grid.fixed,
        "metric": _title(scored),
        "runs": [_record(run) for run in runs],
        "settings": [{"settings": values, **asdict(found)} for values, found in settings],
        "differences": [
            {"settings": values, "of": second, "minus": first, **asdict(found)}
            for values, first, second, found in pairs
        ],
    }
    table = _table(grid, runs, settings, pairs, f"{about['pipeline']} {about['recipe']}")
    replace_file(output / "sweep.json", [json.dumps(document, indent=2, ensure_ascii=False) + "\n"])
    replace_file(output / "table.md", [table + "\n"])
    if scored:
        _draw(grid, settings, scored, output / "sweep.png")
    return table


def _settings(grid: Grid, runs: Sequence[Scored]) -> list[tuple[dict[str, Any], Spread]]:
    """Return every setting with the spread of its seeds' scores."""
    keys = [key for key in grid.points[0].settings if key not in grid.seeds]
    groups: dict[tuple[Any, ...], list[Scored]] = {}
    for run in runs:
        groups.setdefault(run.at(keys), []).append(run)
    found = []
    for group in groups.values():
        values = [run.metric.value for run in group if run.metric is not None]
        if values:
            found.append(({key: group[0].point.settings[key] for key in keys}, spread(values)))
    return found


def _pairs(grid: Grid, runs: Sequence[Scored]) -> list[tuple[dict[str, Any], Any, Any, Difference]]:
    """Return the differences between the values of ``grid.compared``, at equal other settings and equal seeds."""
    if not grid.compared:
        return []
    others = [key for key in grid.points[0].settings if key not in (*grid.seeds, *grid.compared)]
    groups: dict[tuple[Any, ...], dict[Any, dict[Any, Scored]]] = {}
    for run in runs:  # those without scores too, so that a difference has the same sign everywhere
        values = groups.setdefault(run.at(others), {}).setdefault(run.at(grid.compared), {})
        if run.metric is not None:
            values[run.at(grid.seeds)] = run
    found = []
    for group in groups.values():
        for first, second in itertools.combinations(group.values(), 2):
            both = [(first[seed], second[seed]) for seed in first if seed in second]
            if not both:
                continue
            if len(both) > 1:
                difference = difference_over_seeds([after.metric.value - before.metric.value for before, after in both])
            else:
                sides = [(run.metric, results_folder(run.folder)) for run in both[0]]
                difference = difference_over_questions(*sides)
            names = [run.point.settings[grid.compared[0]] for run in both[0]]
            settings = {key: both[0][0].point.settings[key] for key in others}
            found.append((settings, *names, difference))
    return found


def _record(run: Scored) -> dict[str, Any]:
    """Return what ``sweep.json`` says of a run; ``peak_gib`` is the largest of its log, None where there is none."""
    rows = read_metrics(run.folder / "metrics.jsonl") if (run.folder / "metrics.jsonl").is_file() else []
    environment = run.folder / "environment.json"
    return {
        "name": run.point.name,
        "settings": run.point.settings,
        **asdict(run.outcome),
        "log": f"{run.point.name}.log",
        "peak_gib": max((row["peak_gib"] for row in rows if "peak_gib" in row), default=None),
        "metrics": [asdict(metric) for metric in run.metrics],
        "environment": json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else None,
    }


def _title(scored: Sequence[Scored]) -> str | None:
    return f"{scored[0].metric.name} {scored[0].metric.metric}" if scored else None


def _table(grid: Grid, runs: Sequence[Scored], settings: Sequence, pairs: Sequence, what: str) -> str:
    """Return the whole text of ``table.md``; scores and differences are times 100."""
    scored = [run for run in runs if run.metric is not None]
    parts = [f"# Sweep of {what}", f"{len(scored)} of {len(runs)} runs are finished."]
    if scored:
        keys = list(settings[0][0])
        metric = scored[0].metric
        better = "higher" if metric.higher_is_better else "lower"
        text = f"{_title(scored)}, %, {better} is better"
        text += f"; chance {100 * metric.extra['chance']:.1f}" if "chance" in metric.extra else ""
        over = f"n, sd, min and max are over {', '.join(grid.seeds)}." if grid.seeds else "No seed was swept."
        rows = [
            [*map(_text, values.values()), str(found.n), *map(_percent, (found.mean, found.sd, found.min, found.max))]
            for values, found in settings
        ]
        parts += [f"{text}. {over}", _markdown([*keys, "n", "mean", "sd", "min", "max"], rows)]
    if pairs:
        rows = [
            [*map(_text, values.values()), f"{_text(second)} - {_text(first)}", *_cells(found)]
            for values, first, second, found in pairs
        ]
        header = [*pairs[0][0], grid.compared[0], "pairs", "difference", "95 % interval", "interval is"]
        parts += [f"Differences by {grid.compared[0]}, paired by all other fields:", _markdown(header, rows)]
    elif not grid.compared:
        parts.append("No differences: no swept field but seeds has values that are not numbers.")
    parts += _notes(scored)
    unfinished = [run for run in runs if run.metric is None]
    parts += ["Not finished: " + "; ".join(map(_why, unfinished)) + ". The same command goes on."] if unfinished else []
    return "\n\n".join(parts)


def _notes(scored: Sequence[Scored]) -> list[str]:
    """Return what makes the runs' scores hard to compare."""
    same = {
        "questions": {run.metric.dataset_hash for run in scored},
        "ways of scoring": {run.metric.config_hash for run in scored},
        "commits": {run.metric.commit for run in scored},
    }
    different = [name for name, values in same.items() if len(values) > 1]
    return [f"Careful: the runs differ in their {', '.join(different)}."] if different else []


def _why(run: Scored) -> str:
    reason = run.outcome.status
    if reason == "finished":
        reason += " without scores"
    if reason == "failed":
        status = run.outcome.exit_status
        reason += f" with status {status}" if status else " to leave results"
    return f"{run.point.name} ({reason})" if reason == "not begun" else f"{run.point.name} ({reason}, {run.folder}.log)"


def _draw(grid: Grid, settings: Sequence, scored: Sequence[Scored], picture: Path) -> None:
    """Draw score against the drawn axis, a line per combination of the other fields, standard deviations as bars."""
    curves: dict[str, list[tuple[Any, float, float]]] = {}
    along = grid.drawn[0] if grid.drawn else None
    for values, found in settings:
        others = {key.rpartition(".")[2]: value for key, value in values.items() if key not in grid.drawn}
        words = [value if isinstance(value, str) else f"{key} {_text(value)}" for key, value in others.items()]
        label = ", ".join(words) or "mean"
        place = "all seeds" if along is None else values[along] if grid.is_numeric(along) else _text(values[along])
        curves.setdefault(label, []).append((place, 100 * found.mean, 100 * (found.sd or 0.0)))
    chance = scored[0].metric.extra.get("chance")
    title = f"Mean and standard deviation over {', '.join(grid.seeds)}" if grid.seeds else "One run each"
    names = (along or "", f"{_title(scored)}, %", title)
    plot_curves(curves, names, picture, None if chance is None else 100 * chance)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that reads as well on a screen."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _cells(found: Difference) -> list[str]:
    signed = ["-" if value is None else f"{100 * value:+.1f}" for value in (found.mean, found.low, found.high)]
    return [str(found.n), signed[0], "-" if found.low is None else f"{signed[1]} to {signed[2]}", found.interval]
