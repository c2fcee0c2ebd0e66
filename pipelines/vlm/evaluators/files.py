"""Read a benchmark's files, and say what is missing or malformed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LAYOUT = "LLaVA's playground/data/eval: its eval.zip, with each benchmark's own files put in"


def problem(text: str) -> ValueError:
    """Return the ``DataError`` that says ``text``; its module is imported only now."""
    from dora_core.data.rows import DataError

    return DataError(text)


def need_file(root: Path, names: Sequence[str], purpose: str) -> Path:
    """Return the first of ``names`` that is a file under ``root``; raises ``DataError`` if none is."""
    found = next((root / name for name in names if (root / name).is_file()), None)
    if found is None:
        raise problem(
            f"{purpose}: {root} has no {' and no '.join(names)}. evaluate.path must be a folder laid out as {LAYOUT}. "
            "Put the file there, or set evaluate.path to where it is."
        )
    return found


def first_folder(root: Path, names: Sequence[str]) -> str:
    """Return the first of ``names`` that is a folder under ``root``, or the first of all."""
    return next((name for name in names if (root / name).is_dir()), names[0])


def need_images(rows: Sequence[Mapping[str, Any]], root: Path) -> None:
    """Raise ``DataError`` unless every image that ``rows`` name is a file under ``root``."""
    names = dict.fromkeys(row["image"] for row in rows if row.get("image") is not None)
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise problem(
            f"{len(missing)} of {len(names)} images are missing, such as {root / missing[0]}; every question's image "
            "must be there. Download them, or lower evaluate.limit to the rows whose images you have."
        )


def read_lines(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines or of one JSON list, each with ``fields`` of the types given."""
    from dora_core.data.rows import read_rows

    return _with_fields(read_rows(str(path)), fields, path)


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the one JSON object that a file holds; raises ``DataError`` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # of the encoding or of the JSON
        raise problem(f"{path} is not JSON ({error}); it must hold one object. Download it again.") from None
    if not isinstance(content, dict):
        raise problem(f"{path} holds a {type(content).__name__}; it must hold one JSON object. Download it again.")
    return content


def read_list(path: Path, key: str, fields: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """Return the list of objects under ``key`` of a JSON object, each with ``fields`` of the types given."""
    rows = read_mapping(path).get(key)
    if not isinstance(rows, list):
        raise problem(f"{path} has no list under {key!r}; the questions must be there. Download it again.")
    return _with_fields(rows, fields, path)


def read_entries(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> dict[str, dict[str, Any]]:
    """Return a JSON object of objects by question id, each with ``fields`` of the types given."""
    entries = read_mapping(path)
    _with_fields(list(entries.values()), fields, path)
    return entries


def look_up(table: Mapping[Any, Any], key: Any, path: Path) -> Any:
    """Return ``table[key]``; raises ``DataError`` if it is absent from ``path``, where ``table`` was read."""
    if key not in table:
        raise problem(
            f"{path} has nothing for the question {key!r}; it must cover every question asked. Use question and "
            "annotation files of the same version."
        )
    return table[key]


def _with_fields(
    rows: list[dict[str, Any]], fields: Mapping[str, type | tuple[type, ...]], path: Path
) -> list[dict[str, Any]]:
    for number, row in enumerate(rows, 1):
        for name, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                kinds = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
                raise problem(
                    f"{path}, row {number} is {json.dumps(row)[:200]}; it must have {name!r}, of type {kinds}. "
                    "Correct the row, or download the file again."
                )
    return rows
