"""Recipes: strict YAML checked against frozen dataclasses, overridden by the command line, dumped for the run.

defaults < recipe (and its one optional ``base:``) < command line -> ``runs/<name>/config.yaml``.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dora_core.overrides import fields_at, merge_overrides, split_arguments
from dora_core.sections import (
    ConfigError,
    DeepSpeedSection,
    LogSection,
    RunSection,
    TrainSection,
    require,
    section,
)
from dora_core.yaml_text import read_yaml, yaml_parser

__all__ = [
    "ConfigError",
    "DeepSpeedSection",
    "LogSection",
    "RunSection",
    "TrainSection",
    "dump_config",
    "exit_with_message",
    "find_recipe",
    "load_config",
    "merge_overrides",
    "read_yaml",
    "require",
    "section",
    "split_arguments",
    "validate",
]

C = TypeVar("C")


def load_config(cls: type[C], recipe: str | Path | None, overrides: Sequence[str] = (), *, recipes: Path) -> C:
    """Return ``cls`` built from a recipe and command-line overrides such as ``--train.lr 1e-4``.

    ``recipe`` is a file or the name of a file in the folder ``recipes``. Raises ``ConfigError`` with the file,
    the key's path and what is allowed.
    """
    raw: dict[str, Any] = {}
    where = "the defaults"
    if recipe is not None:
        path = find_recipe(recipe, recipes)
        raw, where = _read_with_base(path), str(path)
    merge_overrides(raw, overrides, cls)
    return validate(cls, raw, where + (" with the command line" if overrides else ""))


def find_recipe(recipe: str | Path, recipes: Path) -> Path:
    """Return the file of a recipe given by path or by name."""
    from dora_core.registry import unknown_name

    for candidate in (Path(recipe), recipes / f"{recipe}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(path.stem for path in recipes.glob("*.yaml"))
    raise unknown_name(
        "recipe", str(recipe), names, f" Give one of these names or the path of a YAML file ({recipes})."
    )


def validate(cls: type[C], raw: dict[str, Any], where: str) -> C:
    """Return ``cls`` from plain data, or raise ``ConfigError`` that lists every mistake with its key."""
    import pydantic

    try:
        config = pydantic.TypeAdapter(cls).validate_python(raw)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where}: " + "\n  ".join(_explain(cls, problem) for problem in error.errors())) from None
    for key, given, kept in _booleans(raw, config):
        if not isinstance(kept, bool):  # pydantic reads true as 1
            raise ConfigError(f"{where}: {key} is {given!r}; it must be a number or absent. Write the number.")
    return config


def dump_config(config: Any) -> str:
    """Return the YAML text of a configuration; ``load_config`` of it gives an equal object."""
    buffer = io.StringIO()
    yaml_parser().dump(_plain(config), buffer)
    return buffer.getvalue()


def exit_with_message(error: Exception) -> None:
    """End the process as a user's mistake ends: one message on standard error, exit status 2, no traceback."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _explain(cls: Any, problem: Any) -> str:
    """Return one line on a pydantic error: the key, what was given, what is allowed or what to do."""
    from dora_core.registry import unknown_name

    loc = [str(part) for part in problem["loc"]]
    key = ".".join(loc)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return str(unknown_name("key", key, [".".join([*loc[:-1], name]) for name in fields_at(cls, loc[:-1])]))
    if problem["type"] in ("missing", "missing_argument"):
        return f"{key} is required and has no default. Add it to the recipe or pass --{key} VALUE."
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "list_type" and isinstance(problem["input"], str):
        return f"{key} is {problem['input']!r}; it must be a list. Write [{problem['input']}]."
    return f"{key} is {problem['input']!r}: {problem['msg']}."


def _read_with_base(path: Path) -> dict[str, Any]:
    raw = read_yaml(path)
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base is {base!r}; it must be the file name of one other recipe.")
    parent_path = path.parent / (base if base.endswith(".yaml") else base + ".yaml")
    if not parent_path.is_file():
        raise ConfigError(f"{path}: base {base!r} is not a file beside it ({parent_path}).")
    parent = read_yaml(parent_path)
    if "base" in parent:
        raise ConfigError(f"{path}: its base {parent_path.name} has a base itself. One level is the limit.")
    return _merge(parent, raw)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _booleans(raw: dict[str, Any], config: Any, path: str = "") -> Iterator[tuple[str, bool, Any]]:
    """Yield key, given and kept value of every boolean in ``raw`` that belongs to a field of a section."""
    for name, given in raw.items():
        kept = getattr(config, name)
        if isinstance(given, bool):
            yield path + name, given, kept
        elif isinstance(given, dict) and dataclasses.is_dataclass(kept):
            yield from _booleans(given, kept, f"{path}{name}.")
