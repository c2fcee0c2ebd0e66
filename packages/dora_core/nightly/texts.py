"""A night's rows for programs and terminals: ``results.jsonl``, JUnit XML, Markdown and one line on the screen."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from dora_core.nightly.rows import ORDER, Row
from dora_core.nightly.verdict import FAMILY_LEVEL, NUM_REFERENCES

CONTROL = (
    "Multiple comparisons: all paired tests of the night are one family. Their one-sided p-values are adjusted by "
    f"Holm's method and red at {FAMILY_LEVEL:g} or less: if nothing changed, the chance of any false red among them is "
    f"at most {FAMILY_LEVEL:g} a night. Bands, max(floor, k x standard error), are no tests and not adjusted. "
    f"References are pinned values, else medians of the last {NUM_REFERENCES} nights that were not red, on the same "
    "hardware and data only."
)
FORMAT_VERSION = 1
"""Of a line of results.jsonl."""
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def exit_status(rows: Sequence[Row]) -> int:
    """Return 3 if an entry broke, else 1 if a row is red, else 0."""
    verdicts = {row.verdict for row in rows}
    return 3 if "broken" in verdicts else int("red" in verdicts)


def summary(rows: Sequence[Row]) -> str:
    """Return how many rows there are of each verdict, worst first."""
    counts = Counter(row.verdict for row in rows)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict])


def number(value: float | None) -> str:
    """Return a number as a reader wants it: four digits, more for counts; a dash for none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"


def value_text(row: Row) -> str:
    """Return value and standard error."""
    return number(row.value) + (f" ± {number(row.stderr)}" if row.stderr else "")


def record(row: Row, night: str) -> dict[str, Any]:
    """Return a row as plain data; a value that is not finite is null, and its reason says so."""
    own = row.measured
    return {
        "format": FORMAT_VERSION,
        "night": night,
        "pipeline": row.planned.pipeline,
        "entry": row.planned.entry.name,
        "metric": row.metric,
        "verdict": row.verdict,
        "reason": row.reason,
        "value": row.value if row.value is not None and math.isfinite(row.value) else None,
        "stderr": row.stderr,
        "n": row.n,
        "unit": row.unit,
        "reference": row.reference,
        "band": row.band,
        "data_hash": row.data_hash,
        "commit": own.commit if own else None,
        "hardware": own.hardware if own else None,
        "versions": own.versions if own else None,
        "config_hash": own.config_hash if own else None,
        "changes": list(row.notes),
        "flipped": [flip.index for flip in row.flips],
        "reproduce": row.planned.reproduce(),
    }


def jsonl(rows: Sequence[Row], night: str) -> str:
    """Return the content of ``results.jsonl``: one JSON object a row."""
    return "".join(json.dumps(record(row, night), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def junit(rows: Sequence[Row], night: str) -> str:
    """Return JUnit XML: an entry is a suite, a metric a case; red fails, broken is an error, grey is skipped."""
    root = ElementTree.Element("testsuites", name=f"dora nightly {night}")
    for name in dict.fromkeys(row.planned.name for row in rows):
        own = [row for row in rows if row.planned.name == name]
        counts = Counter(row.verdict for row in own)
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=name,
            tests=str(len(own)),
            failures=str(counts["red"]),
            errors=str(counts["broken"]),
            skipped=str(counts["grey"]),
        )
        for row in own:
            case = ElementTree.SubElement(suite, "testcase", classname=name.replace("/", "."), name=_xml(row.metric))
            text = _xml(f"{value_text(row)}, reference {number(row.reference)}: {row.reason}")
            kind = {"red": "failure", "broken": "error", "grey": "skipped"}.get(row.verdict)
            if kind:
                ElementTree.SubElement(case, kind, message=text)
            else:
                ElementTree.SubElement(case, "system-out").text = f"{row.verdict}: {text}"
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(rows: Sequence[Row], night: str) -> str:
    """Return the content of ``report.md``: one table, worst first, and the command behind every entry."""
    lines = [f"# dora nightly {night}", "", summary(rows), "", CONTROL, ""]
    lines += ["| verdict | entry | metric | value | reference | unit | reason |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = (
            row.verdict,
            row.planned.name,
            row.metric,
            value_text(row),
            number(row.reference),
            row.unit,
            row.reason,
        )
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    lines += ["", "## Again by hand", ""]
    for name, row in {row.planned.name: row for row in rows}.items():
        lines += [f"{_cell(name)}:", "", "```bash", row.planned.reproduce(), "```", ""]
        lines += [f"- changed since the reference night: {_cell(note)}" for note in row.notes] + [""] * bool(row.notes)
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(escaped.split())


def _xml(text: str) -> str:
    return _NOT_IN_XML.sub("�", text)
