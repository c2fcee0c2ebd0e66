"""The runs of a sweep: which are finished, which may go on, and one of them under the launcher."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dora_core.config import ConfigError, load_config
from dora_core.evaluation.results import RESULTS_FILE, replace_file
from dora_core.sweep.grid import Point
from dora_core.training.checkpoint import CheckpointStore
from dora_core.training.launcher import Stop, launch, launch_command

OUTCOME_FILE = "outcome.json"
MAY_CHANGE = ("run.root", "run.resume", "log.")
"""What a run that goes on may have otherwise than when it began: it changes no number."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How far a run has come."""

    status: str
    """``not begun``, or one of ``LaunchResult``: finished, timed out, stopped, failed."""
    seconds: float = 0.0
    """Of all attempts together."""
    exit_status: int | None = None


def results_folder(folder: Path) -> Path:
    """Return where a run leaves its scores."""
    return folder / "results" / "after"


def read_outcome(folder: Path) -> Outcome:
    """Return how far the run of a folder has come; one whose results were deleted is no longer finished."""
    path = folder / OUTCOME_FILE
    if not path.is_file():
        return Outcome(status="not begun")
    outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
    if outcome.status == "finished" and not (results_folder(folder) / RESULTS_FILE).is_file():
        return Outcome(status="failed", seconds=outcome.seconds, exit_status=outcome.exit_status)
    return outcome


def refuse_changed(pipeline: Any, point: Point) -> None:
    """Raise ``ConfigError`` if the run's folder holds work that another configuration did."""
    folder = Path(point.config.run.root) / point.name
    path = folder / "config.yaml"
    has_work = read_outcome(folder).status == "finished" or CheckpointStore(folder / "checkpoints").steps()
    if not path.is_file() or not has_work:
        return
    change = f"Give another --output to keep both, or delete {folder} to run it anew."
    try:
        before = dict(_flat(load_config(pipeline.config, path, recipes=pipeline.recipes)))
    except ConfigError as error:
        raise ConfigError(f"{error} It is of a run of an earlier version or of another pipeline. {change}") from None
    now = dict(_flat(point.config))
    changes = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in now | before
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changes:
        raise ConfigError(f"{folder} holds a run of another recipe: {'; '.join(changes)}. {change}")


def run_point(
    script: Path | str, point: Point, num_ranks: int, time_limit_s: float | None, place: int, stop: Stop
) -> Outcome:
    """Run or resume one point in a process of its own and return how far it has come, which its folder keeps.

    The output goes to ``<folder>.log``. Ctrl-C stops the run, so that it can be resumed, and raises
    ``KeyboardInterrupt``; so does ``stop``. ``place`` is its own among the runs that go on at once.
    """
    folder = Path(point.config.run.root) / point.name
    folder.mkdir(parents=True, exist_ok=True)
    before = read_outcome(folder).seconds
    started = time.monotonic()
    outcome = Outcome(status="stopped")
    try:
        result = launch(
            launch_command(script, point.arguments, num_ranks, place),
            folder.with_name(f"{point.name}.log"),
            time_limit_s=time_limit_s,
            environment={"OMP_NUM_THREADS": "1"},
            stop=stop,
        )
        outcome = Outcome(status=result.status, exit_status=result.exit_status)
    finally:
        outcome = replace(outcome, seconds=before + time.monotonic() - started)
        replace_file(folder / OUTCOME_FILE, [json.dumps(asdict(outcome)) + "\n"])
    return read_outcome(folder)


def _flat(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every field."""
    values = config if isinstance(config, Mapping) else asdict(config)
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield path + key, value
