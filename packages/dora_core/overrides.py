"""The command line of a training script: ``--config RECIPE`` and ``--section.field value``."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from dora_core.sections import ConfigError
from dora_core.yaml_text import yaml_parser, yaml_problem


def merge_overrides(raw: dict[str, Any], overrides: Sequence[str], cls: Any = None) -> None:
    """Write ``--section.field value`` (or ``--section.field=value``) pairs into ``raw``.

    Values are YAML; where the field of ``cls`` takes text, what YAML would read as a number, a boolean or a date stays
    the text that was typed.
    """
    for key, text in override_pairs(overrides):
        node = raw
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--{key}: {parent} is a value, not a section.")
        node[last] = _typed_value(key, text, _takes_text(cls, key.split(".")))


def override_pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the key and the typed value of each override."""
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(
                f"Unexpected argument {word!r}. Overrides read --section.field value, as --train.lr 1e-4."
            )
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"--{key} has no value. Write --{key} VALUE, or --{key}=VALUE.")
            text = words.pop(0)
        yield key, text


def split_arguments(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split a training script's arguments into the recipe of ``--config`` and the overrides that remain."""
    recipe, rest, words = None, [], list(argv)
    while words:
        word, equals, value = words.pop(0).partition("=")
        if word == "--config":
            if not equals and words and not words[0].startswith("--"):
                value = words.pop(0)
            if not value:
                raise ConfigError("--config has no value. Write --config RECIPE or --config path/to/recipe.yaml.")
            if recipe is not None:
                raise ConfigError(f"--config is given twice: {recipe} and {value}. Give it once.")
            recipe = value
        elif word in ("--local_rank", "--local-rank"):  # launchers add it; LOCAL_RANK says the same
            if not equals and words:
                words.pop(0)
        else:
            rest.append(word + equals + value)
    return recipe, rest


def fields_at(cls: Any, keys: Sequence[str]) -> dict[str, Any]:
    """Return the fields of the section at ``keys`` and their types; empty where there is no section."""
    for key in keys:
        cls = typing.get_type_hints(cls).get(key) if dataclasses.is_dataclass(cls) else None
    return typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}


def _typed_value(key: str, text: str, takes_text: bool) -> Any:
    from ruamel.yaml import YAMLError

    try:
        value = yaml_parser().load(text) if text.strip() else text
    except YAMLError as error:
        raise ConfigError(
            f"--{key} {text!r} is not a YAML value: {yaml_problem(error)}. If it is text, put it in quotes twice: "
            f"--{key} \"'...'\"."
        ) from None
    return value if not takes_text or value is None or isinstance(value, str | list | dict) else text


def _takes_text(cls: Any, keys: list[str]) -> bool:
    *parents, last = keys
    hints = fields_at(cls, parents)
    return last in hints and str in (hints[last], *typing.get_args(hints[last]))
