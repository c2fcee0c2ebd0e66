"""Recipes and overrides are YAML 1.2: 1e-4 is a number, yes and no are text, a key given twice is an error."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
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


def edit_yaml(text: str, edits: Iterable[tuple[Sequence[str | int], Any]]) -> str:
    """Return a YAML document with values set at paths, comments and order kept; mappings on the way are made.

    A list is added to the one at its path. Lists inside of mappings are taken to be indented by two.
    """
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.width = 1 << 30
    yaml.indent(mapping=2, sequence=4, offset=2)
    document = yaml.load(text)
    for (*parents, last), value in edits:
        node = document
        for key in parents:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]
        node[last] = [*(node.get(last) or []), *value] if isinstance(value, list) else value
    buffer = io.StringIO()
    yaml.dump(document, buffer)
    return buffer.getvalue()


def yaml_problem(error: Exception) -> str:
    """Return what is wrong, in one line, without the parser's context."""
    problem = getattr(error, "problem", None) or str(error)
    return problem.strip().splitlines()[0].rstrip(".")
