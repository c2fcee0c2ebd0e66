"""Many JSON rows in one block of memory, which processes share instead of copying it."""

from __future__ import annotations

import hashlib
import json
import operator
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dora_core.data.rows import DataError


class RowStore(Sequence[dict[str, Any]]):
    """An immutable sequence of JSON objects, kept as one buffer of JSON lines and parsed at each access.

    It costs about the size of its JSON and has no Python object per row whose reference count a forked worker would
    write to, so workers share the buffer. A row comes back equal to what went in if it is JSON as ``json.loads``
    makes it: dicts with string keys, lists, strings, numbers, booleans and None. Each access gives a new dict.

    Raises ``DataError`` for a row that is not a mapping or holds anything that JSON cannot.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        text = bytearray()
        starts = array("q", [0])
        for index, row in enumerate(rows):
            text += _json_line(row, index)
            starts.append(len(text))
        self._text = np.frombuffer(text, np.uint8)
        self._text.setflags(write=False)
        self._starts = np.frombuffer(starts, np.int64)
        self._starts.setflags(write=False)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"row {position} was asked for; there are {len(self)}")
        position %= len(self)
        start, stop = self._starts[position : position + 2]
        return json.loads(self._text[start:stop].tobytes().decode("utf-8", "surrogatepass"))

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the rows, their order and the order of their fields."""
        return hashlib.sha256(self._text).hexdigest()


def _json_line(row: Mapping[str, Any], index: int) -> bytes:
    if not isinstance(row, Mapping):
        raise DataError(
            f"row {index + 1} is a {type(row).__name__}; a row must be a JSON object. Give a mapping for each row."
        )
    try:
        text = json.dumps(dict(row), ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"row {index + 1} cannot be written as JSON ({error}); it may hold strings, numbers, booleans, null, lists "
            "and objects. Convert or remove the other values."
        ) from None
    return text.encode("utf-8", "surrogatepass") + b"\n"  # JSON allows half a surrogate pair, UTF-8 does not
