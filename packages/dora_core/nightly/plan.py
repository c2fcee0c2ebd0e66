"""What a night runs: the entries of every pipeline's ``nightly.yaml``, checked before anything starts."""

from __future__ import annotations

import importlib.util
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dora_core.config import ConfigError, dump_config, load_config, read_yaml, require, section, validate
from dora_core.registry import PIPELINES, pipeline_packages, unknown_name
from dora_core.training.launcher import training_script

PLAN_FILE = "nightly.yaml"


@section
class Band:
    """How far a metric may get worse before it is red; what is absent is the metric's default."""

    expected: dict[str, float] = field(default_factory=dict)
    """Hardware, as the report names it, to the pinned value that takes the place of the median of recent nights."""
    floor: float | None = None
    """In the metric's unit. What a paired test finds must be larger too."""
    relative_floor: float | None = None
    """As a share of the reference; the larger of the two floors counts."""
    k: float | None = None
    """Standard errors; the band is the larger of the floors and k standard errors."""

    def __post_init__(self) -> None:
        for name in ("floor", "relative_floor", "k"):
            given = getattr(self, name)
            require(given is None or given >= 0, name, given, "0 or more, or absent")


@section
class Entry:
    """One training run of a night."""

    name: str
    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the recipe, as ``train.max_steps``, to values."""
    time_limit_s: float
    ranks: int = 1
    setup: Literal["prepare"] | None = None
    """prepare: run in a folder of the night's, where ``dora prepare`` has filled ``data/world``; else where the
    command was started."""
    bands: dict[str, Band] = field(default_factory=dict)
    """By metric, as the report names it."""
    data: list[str] = field(default_factory=list)
    """Accepted hashes of training and evaluation rows, or their first 8 characters or more."""
    retired: list[str] = field(default_factory=list)
    """Metrics that the history has and that are no longer measured on purpose."""

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "name", self.name, "a folder name without '/'")
        require(self.time_limit_s > 0, "time_limit_s", self.time_limit_s, "a positive number of seconds")
        require(self.ranks > 0, "ranks", self.ranks, "a positive integer")
        require(
            all(len(each) >= 8 for each in self.data), "data", self.data, "a list of hashes of 8 or more characters"
        )


@dataclass(frozen=True, kw_only=True)
class Planned:
    """An entry and whose it is."""

    pipeline: str
    entry: Entry
    folder: Path
    """The pipeline's folder, with ``nightly.yaml``, ``train.py`` and perhaps ``golden/``."""
    script: Path | str
    """The training script: the folder's ``train.py``, or that module of an installed distribution."""

    @property
    def name(self) -> str:
        """``pipeline/entry``."""
        return f"{self.pipeline}/{self.entry.name}"

    def arguments(self) -> list[str]:
        """Return the training script's arguments that decide what is computed."""
        words = ["--config", self.entry.recipe]
        for key, value in self.entry.overrides.items():
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]  # JSON is YAML
        return words

    def reproduce(self) -> str:
        """Return the shell commands that repeat the run by hand, from the repository's root if that is its script's."""
        script = ["--module", self.script]
        if isinstance(self.script, Path):
            script = [str(self.script.relative_to(self.folder.parents[1]))]
        command = shlex.join(["deepspeed", "--num_gpus", str(self.entry.ranks), *script, *self.arguments()])
        prepare = f"dora prepare {self.pipeline} data/world && " if self.entry.setup == "prepare" else ""
        return prepare + command


def find_plan() -> list[Planned]:
    """Return the entries of all pipelines that the registry finds, in the order of names and files.

    Raises ``ConfigError`` for a file that says anything it cannot, with the file and the key.
    """
    planned: list[Planned] = []
    for pipeline, package in pipeline_packages().items():
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (Path(place) / PLAN_FILE).is_file():
                planned += read_plan(pipeline, Path(place), training_script(package))
    return planned


def read_plan(pipeline: str, folder: Path, script: Path | str | None = None) -> list[Planned]:
    """Return the entries of ``folder/nightly.yaml``, run by ``script`` or the folder's ``train.py``.

    Raises ``ConfigError`` as ``find_plan`` does.
    """
    path = folder / PLAN_FILE
    content = read_yaml(path)
    if set(content) != {"entries"} or not isinstance(content["entries"], list):
        raise ConfigError(
            f"{path} has the keys {sorted(content)}; it must have one, entries, with a list. Correct the file."
        )
    entries = []
    for number, raw in enumerate(content["entries"]):
        where = f"{path}: entries[{number}]"
        if not isinstance(raw, dict):
            raise ConfigError(f"{where} is {raw!r}; it must be a mapping. Give it a name, a recipe and a time_limit_s.")
        for key in ("name", "recipe", "time_limit_s"):
            if key not in raw:
                raise ConfigError(f"{where} has no {key}, which every entry needs. Add it to the file.")
        entry = validate(Entry, raw, where)
        if entry.name in {other.name for other in entries}:
            raise ConfigError(f"{where}: two entries are called {entry.name!r}. Rename one: names are history's keys.")
        entries.append(entry)
    script = script or folder / "train.py"
    planned = [Planned(pipeline=pipeline, entry=entry, folder=folder, script=script) for entry in entries]
    for each in planned:
        check_recipe(each, path)
    return planned


def check_recipe(planned: Planned, path: Path) -> None:
    """Raise ``ConfigError`` unless the recipe loads with the entry's overrides and the run can be compared."""
    pipeline = PIPELINES.get(planned.pipeline)
    recipe, *overrides = planned.arguments()[1:]
    try:
        dump_config(load_config(pipeline.config, recipe, overrides, recipes=pipeline.recipes))
    except ValueError as error:
        raise ConfigError(f"{path}: entry {planned.entry.name!r}: {error}") from None
    taken = sorted({"run.name", "run.root", "run.resume"} & set(planned.entry.overrides))
    if taken:
        raise ConfigError(
            f"{path}: entry {planned.entry.name!r} overrides {', '.join(taken)}; the night sets it. Remove it."
        )


def select(planned: list[Planned], only: str | None) -> list[Planned]:
    """Return the entries that ``--only PIPELINE[/ENTRY]`` means; raises ``ValueError`` if there are none."""
    chosen = [each for each in planned if only is None or only in (each.pipeline, each.name)]
    if not chosen and only is not None:
        known = sorted({each.pipeline for each in planned} | {each.name for each in planned})
        raise unknown_name("entry", only, known, " Give --only one of these.")
    if not chosen:
        raise ConfigError(
            f"No pipeline has entries: none of {', '.join(pipeline_packages())} has a {PLAN_FILE}. Add one beside its "
            "pipeline.py."
        )
    return chosen
