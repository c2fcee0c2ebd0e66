"""Read rows (JSON objects) from files, folders and the Hugging Face hub, and say where a bad row is."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dora_core.registry import DATASETS, pipeline_packages

T = TypeVar("T")
HUB_PREFIX = "hf:"
INDEX_SUFFIX = ".index.json"
"""How the names of shards' indices end: JSON that holds no rows."""
_SUFFIXES = (".json", ".jsonl")
_BLANK = re.compile(r"[ \t\r\n]*")


class DataError(ValueError):
    """Rows cannot be used; the message gives the file and the line."""


def read_source(source: str) -> list[dict[str, Any]]:
    """Return the rows of a registered name such as ``llm/commonsense``, or of anything ``read_rows`` reads.

    A file or folder that exists comes before a name.
    """
    if source.split("/")[0] in pipeline_packages() and not Path(source).exists():
        return DATASETS.get(source)()
    return read_rows(source)


def read_rows(source: str) -> list[dict[str, Any]]:
    """Return every row of ``source`` in file order.

    ``source`` is a file (JSON list, or JSON lines), a folder, or ``hf:<name>[:<split>]`` (split ``train`` if not
    given). A folder means all its ``*.json`` and ``*.jsonl`` files by name or, if it has none, the ``train.json``
    of each subfolder. Raises ``DataError`` for a missing or empty source and for anything that is not an object.
    """
    if source.startswith(HUB_PREFIX):
        return _hub_rows(source)
    return [row for _, _, row in _located_rows(source)]


def require_fields(
    rows: Sequence[dict[str, Any]], fields: Sequence[str], source: str, *, optional: Sequence[str] = ()
) -> None:
    """Raise ``DataError`` unless every row has a string under each of ``fields``.

    ``optional`` fields may be absent but not of another type. ``rows`` are what ``read_rows(source)`` returned: the
    line of a bad row is looked up in ``source`` again.
    """
    for index, row in enumerate(rows):
        for name in fields:
            if name not in row:
                raise DataError(
                    f"{_location(source, index)}: the row has the fields {sorted(row)}; it must have {name!r}. "
                    "Add the field, or choose the template that fits these rows."
                )
        for name in (*fields, *optional):
            if not isinstance(row.get(name, ""), str):
                raise DataError(
                    f"{_location(source, index)}: {name} is {json.dumps(row[name], default=str)[:80]}; it must be a "
                    "string. Put the value in quotes, or remove the row."
                )


def hold_out(rows: Sequence[T], num_held: int, seed: int) -> tuple[list[T], list[T]]:
    """Return the rows without, and the list of, ``num_held`` rows chosen by ``seed``; both keep their order."""
    if num_held >= len(rows):
        raise DataError(
            f"data.num_validation is {num_held} and there are {len(rows)} rows; at least one must be left to train on. "
            "Lower data.num_validation or give data.validation."
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[index] for index in sorted(order[num_held:])], [rows[index] for index in sorted(order[:num_held])]


def source_files(source: str) -> list[Path]:
    """Return the files that ``read_rows(source)`` reads, in order; an ambiguous folder is an error."""
    root = Path(source)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(
            f"{source} is neither a file nor a folder here ({Path.cwd()}). Give a JSON file, a folder, "
            "hf:<name>[:<split>] or a registered name; relative paths start at the working directory."
        )
    direct = sorted(
        path
        for path in root.iterdir()
        if path.suffix in _SUFFIXES and not path.name.endswith(INDEX_SUFFIX) and path.is_file()
    )
    nested = sorted(path for suffix in _SUFFIXES for path in root.glob("*/train" + suffix))
    stems = {path.stem for path in direct}
    if {"train", "test"} <= stems or (direct and nested):
        found = ", ".join(str(path.relative_to(root)) for path in [*direct, *nested])
        raise DataError(
            f"{source} holds {found}; a folder must hold either only files to read or only <task>/train.json. "
            "Name the files themselves, so that no test row is trained on and none is left out."
        )
    if not direct and not nested:
        raise DataError(f"{source} holds no *.json, no *.jsonl and no <task>/train.json. Give a folder that does.")
    return direct or nested


def _located_rows(source: str) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    for path in source_files(source):
        for line, row in _file_rows(path):
            yield path, line, row


def _location(source: str, index: int) -> str:
    if not source.startswith(HUB_PREFIX) and Path(source).exists():
        path, line, _ = next(itertools.islice(_located_rows(source), index, None))
        return f"{path}, line {line}"
    return f"{source}, row {index + 1}"


def _file_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with the number of the line it starts on."""
    text = _read_text(path)
    is_list = path.suffix != ".jsonl" and text.lstrip().startswith("[")
    num_rows = 0
    for line, value in _list_items(text, path) if is_list else _line_items(text, path):
        if not isinstance(value, dict):
            raise DataError(
                f"{path}, line {line}: found a {type(value).__name__}; a row must be a JSON object. "
                "Write {...} there, or name a file that is one JSON list *.json."
            )
        num_rows += 1
        yield line, value
    if num_rows == 0:
        raise DataError(f"{path} holds no rows; it must hold at least one. Remove the file or write it again.")


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason}). Save the file as UTF-8.") from None


def _line_items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error.msg}, column {error.colno}). A file holds one JSON list, "
                "or one object per line. Correct the line."
            ) from None


def _list_items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder()
    position = _skip_blank(text, text.index("[") + 1)
    line, counted, closed = 1, 0, text[position : position + 1] == "]"
    while not closed:
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno}). Correct the line, or "
                "write the file again if it was cut off."
            ) from None
        yield line, value
        position = _skip_blank(text, position)
        closed = text[position : position + 1] == "]"
        if not closed and text[position : position + 1] != ",":
            raise _unexpected(text, position, path, "',' or ']'")
        if not closed:
            position = _skip_blank(text, position + 1)
    position = _skip_blank(text, position + 1)
    if position != len(text):
        raise _unexpected(text, position, path, "nothing after the list")


def _skip_blank(text: str, position: int) -> int:
    return _BLANK.match(text, position).end()


def _unexpected(text: str, position: int, path: Path, allowed: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    found = repr(text[position : position + 20]) if position < len(text) else "the end of the file"
    return DataError(f"{path}, line {line}: found {found}; expected {allowed}. Correct the line.")


def _hub_rows(source: str) -> list[dict[str, Any]]:
    import datasets

    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train").to_list()
    except Exception as error:  # the library raises a dozen unrelated types for a name, a split and a network failure
        raise DataError(
            f"{source} could not be loaded ({type(error).__name__}: {error}). It must be hf:<name>[:<split>] of a data "
            "set that this machine can reach or has cached. Check the name and the split; without a network "
            "(HF_HUB_OFFLINE, HF_DATASETS_OFFLINE), download the rows elsewhere and give a JSON file."
        ) from error
    if not rows:
        raise DataError(f"{source} holds no rows; it must hold at least one. Choose another split.")
    return rows
