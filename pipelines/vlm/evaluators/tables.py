"""MMBench's tables: tab-separated text with images in it, and the workbook that its server takes."""

from __future__ import annotations

import base64
import binascii
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_core.evaluation.results import replacing
from pipelines.vlm.evaluators.files import problem

Cells = dict[str, str]


def is_empty(cell: str) -> bool:
    """Say whether a cell is missing: nothing, or pandas' word for it. "None" and "NA" may be options."""
    return cell.strip().lower() in ("", "nan")


def read_table(path: Path, columns: Sequence[str]) -> list[Cells]:
    """Return the lines of a tab-separated table as texts by column name; raises ``DataError`` for a malformed one.

    ``image`` is base64; where it is another line's ``index``, that line's image is put in its place.
    """
    csv.field_size_limit(sys.maxsize)  # an image is far longer than the 128 KiB allowed at first
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.DictReader(file, delimiter="\t", restval=""))
    except (UnicodeDecodeError, csv.Error) as error:
        raise problem(f"{path} is not a table ({error}); it must be tab-separated UTF-8. Download it again.") from None
    found = [name for name in (lines[0] if lines else {}) if name is not None]
    if not set(columns) <= set(found) or any(None in line for line in lines):
        raise problem(
            f"{path} has {len(lines)} rows under the columns {found}; it must have at least one, no row longer than "
            f"the first line, and the columns {list(columns)}. Download it again."
        )
    images = {line["index"]: line["image"] for line in lines}
    for line in lines:
        line["image"] = images.get(line["image"], line["image"])
    _need_base64(lines, path)
    return lines


def write_workbook(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write ``lines``, of which there is at least one and which have the same keys, under a line of those keys."""
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")

    def cell(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        made = WriteOnlyCell(sheet, value=ILLEGAL_CHARACTERS_RE.sub("", value))
        made.data_type = "s"  # also for what looks like a formula
        return made

    for values in [list(lines[0]), *(line.values() for line in lines)]:
        sheet.append([cell(value) for value in values])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        book.save(temporary)


def _need_base64(lines: Sequence[Cells], path: Path) -> None:
    for text in dict.fromkeys(line["image"] for line in lines):
        try:
            image = base64.b64decode(text)
        except (binascii.Error, ValueError):
            image = b""
        if not image:
            raise problem(f"{path} has the image {text[:40]!r}; it must be in base64. Download the table again.")
