"""The grid of a sweep: which fields have several values, and the configuration of every run, checked before any."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dora_core.config import ConfigError, load_config
from dora_core.overrides import fields_at, override_pairs

OWNED = {
    "run.root": "Its runs go into the folder of --output FOLDER",
    "run.name": "It names its runs after their values",
    "run.resume": "It always goes on where it stopped",
    "evaluate.after_training": "It scores every run",
}
"""Fields that the sweep itself sets, with why."""

MAX_WORD = 32


@dataclass(frozen=True)
class Point:
    """One run of the grid."""

    name: str
    settings: dict[str, Any]
    """The swept fields and their values."""
    arguments: list[str]
    """What the training script is given."""
    config: Any


@dataclass(frozen=True)
class Grid:
    """The runs of a sweep and the roles of its axes. An axis is a field, or several that vary together."""

    axes: list[tuple[str, ...]]
    fixed: dict[str, str]
    """The overrides with one value, as they were typed."""
    points: list[Point]

    def values(self, key: str) -> list[Any]:
        """Return the values of a swept field, in the order given."""
        found = {json.dumps(point.settings[key]): point.settings[key] for point in self.points}
        return list(found.values())

    @cached_property
    def seeds(self) -> tuple[str, ...]:
        """The fields of the axes that hold a seed: what differs between repetitions of a setting."""
        return tuple(key for axis in self.axes if any(_is_seed(key) for key in axis) for key in axis)

    @cached_property
    def compared(self) -> tuple[str, ...]:
        """The axis whose values are compared in pairs: ``adapter.kind``'s, else the first that is not of numbers."""
        return self._axis("adapter.kind", lambda key: not self.is_numeric(key))

    @cached_property
    def drawn(self) -> tuple[str, ...]:
        """The axis to draw along: ``adapter.rank``'s, else the first of numbers, else the first."""
        return self._axis("adapter.rank", self.is_numeric) or self._axis("", lambda key: True)

    def _axis(self, preferred: str, fits: Callable[[str], bool]) -> tuple[str, ...]:
        axes = [axis for axis in self.axes if not set(axis) & set(self.seeds)]
        first = [axis for axis in axes if preferred in axis] or [axis for axis in axes if fits(axis[0])]
        return first[0] if first else ()

    def is_numeric(self, key: str) -> bool:
        """Whether all values of a swept field are numbers."""
        return all(map(_is_number, self.values(key)))


def build_grid(
    pipeline: Any, recipe: str, overrides: Sequence[str], output: Path, together: Sequence[str] = (), num_ranks: int = 1
) -> Grid:
    """Return the grid that ``--section.field v1,v2`` overrides of a recipe span, in the order of the command line.

    Each entry of ``together`` names fields, separated by commas, that take their first values together, then their
    second, and so on. Raises ``ConfigError`` if any point is no valid configuration on ``num_ranks`` ranks.
    """
    if "after_training" not in fields_at(pipeline.config, ["evaluate"]):
        raise ConfigError(
            "This pipeline's recipes have no evaluate.after_training, and a sweep compares scores. Add that field, and "
            "score at the end of training where it is true."
        )
    typed = _read_fields(overrides)
    swept = {key: values for key, values in typed.items() if len(values) > 1}
    if not swept:
        raise ConfigError(
            "No field has several values; a sweep needs one at least. Write for example --adapter.rank 4,8,16."
        )
    fixed = {key: values[0] for key, values in typed.items() if len(values) == 1}
    own = [f"--run.root={output}", "--run.resume=auto", "--evaluate.after_training=true"]
    axes = _axes(swept, together)
    steps = [list(zip(*(swept[key] for key in axis), strict=True)) for axis in axes]
    points = []
    for chosen in itertools.product(*steps):
        texts = dict(zip(itertools.chain(*axes), itertools.chain(*chosen), strict=True))
        words = [f"--{key}={text}" for key, text in (fixed | texts).items()] + own
        config = load_config(pipeline.config, recipe, words, recipes=pipeline.recipes)
        config.train.accumulation(num_ranks)
        settings = {key: value_at(config, key) for key in swept}
        name = _name(settings)
        if name in (point.name for point in points):
            raise ConfigError(f"Two runs would be {name}: a field has a value twice. Give each value once.")
        config = replace(config, run=replace(config.run, name=name))
        points.append(Point(name, settings, ["--config", recipe, *words, f"--run.name={name}"], config))
    return Grid(axes, fixed, points)


def split_values(text: str) -> list[str]:
    """Split a typed value at its commas, but not within brackets, braces or quotes, as YAML has them."""
    values, depth, quote, start = [], 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and (depth or not text[start:place].strip()):  # elsewhere it is an apostrophe
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            values.append(text[start:place].strip())
            start = place + 1
    return [*values, text[start:].strip()]


def value_at(config: Any, key: str) -> Any:
    """Return the value of ``section.field`` in a configuration."""
    for name in key.split("."):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


def _read_fields(overrides: Sequence[str]) -> dict[str, list[str]]:
    typed: dict[str, list[str]] = {}
    for key, text in override_pairs(overrides):
        if key in OWNED:
            raise ConfigError(f"--{key} is {text!r}, but a sweep sets it itself. {OWNED[key]}; leave --{key} out.")
        if key in typed:
            raise ConfigError(f"--{key} is given twice. Give its values once, separated by commas: --{key} v1,v2.")
        typed[key] = split_values(text)
        if len(typed[key]) > 1 and "" in typed[key]:
            raise ConfigError(
                f"--{key} {text!r} has an empty value; values are separated by single commas. Write --{key} v1,v2, or "
                f"--{key} \"'v1,v2'\" for one value with a comma in it."
            )
    return typed


def _axes(swept: Mapping[str, list[str]], together: Sequence[str]) -> list[tuple[str, ...]]:
    joined = [tuple(part.strip() for part in entry.split(",")) for entry in together]
    named = [key for axis in joined for key in axis]
    for key in named:
        if key not in swept or named.count(key) > 1:
            raise ConfigError(
                f"--together names {key}; it must name fields with several values, each once. Swept are "
                f"{', '.join(swept) or 'none'}."
            )
    for axis in joined:
        counts = {key: len(swept[key]) for key in axis}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{key} has {count}" for key, count in counts.items())
            raise ConfigError(f"Fields that vary together need equally many values, but {listed}. Give one per step.")
    axes = [next((axis for axis in joined if key in axis), (key,)) for key in swept]
    return list(dict.fromkeys(axes))


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == "seed"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name(settings: Mapping[str, Any]) -> str:
    """Return a folder name such as ``rank4-seed0-lora``, the same in whatever order the fields are given."""
    lasts = [key.rpartition(".")[2] for key in settings]
    words = []
    for key in sorted(settings, key=lambda key: (isinstance(settings[key], str), key)):
        value, last = settings[key], key.rpartition(".")[2]
        is_plain = isinstance(value, str) and lasts.count(last) == 1  # the value says enough
        label = "" if is_plain else last if lasts.count(last) == 1 else key.replace(".", "_")
        text = value if isinstance(value, str) else json.dumps(value)
        word = re.sub(r"[^A-Za-z0-9_.]+", "_", text).strip("_")[:MAX_WORD]
        if word != text:  # two that differ must not look alike
            word += "." + hashlib.sha256(text.encode()).hexdigest()[:6]
        words.append(label + word if _is_number(value) or not label else f"{label}_{word}")
    return "-".join(words)
