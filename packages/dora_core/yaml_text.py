"""Recipes and overrides are YAML 1.2: 1e-4 is a number, yes and no are text, a key given twice is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dora_core.sections import ConfigError


def yaml_parser() -> Any:
    """Return the one way in which YAML is read and written here: version 1.2, plain data, no tags."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.allow_unicode = False  # what is not ASCII is written escaped: as it is, U+0085 would come back as a space
    yaml.width = 1 << 30  # a long key that is folded does not come back
    return yaml


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML 1.2 file (1e-4 is a number; a key given twice is an error with its line)."""
    from ruamel.yaml import YAMLError

    try:
        raw = yaml_parser().load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {yaml_problem(error)}. Correct the line.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error.reason}). Save the file as UTF-8.") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; a recipe is a mapping of sections.")
    return {key: value for key, value in raw.items() if value is not None}  # an empty section


def yaml_problem(error: Exception) -> str:
    """Return what is wrong, in one line, without the parser's context."""
    problem = getattr(error, "problem", None) or str(error)
    return problem.strip().splitlines()[0].rstrip(".")
