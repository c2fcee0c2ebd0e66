"""``dora nightly --propose``: the diff of ``nightly.yaml`` that accepts what was red or yellow in the newest night.

Nothing is written: who agrees applies the diff (``git apply``) and commits it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from dora_core.nightly.history import History, JudgedMetric
from dora_core.nightly.plan import PLAN_FILE, Planned
from dora_core.yaml_text import edit_yaml

HASH_LENGTH = 12
NUM_DIGITS = 6


def propose(history: History, planned: Sequence[Planned]) -> str:
    """Return unified diffs, one a file that would change; empty where nothing would.

    A metric outside its band or test gets the newest night's value as ``expected`` on that hardware; changed data get
    their hash into ``data``.
    """
    judged = history.newest_night()
    diffs = []
    for folder in dict.fromkeys(each.folder for each in planned):
        path = folder / PLAN_FILE
        before = path.read_text(encoding="utf-8")
        own = [each for each in planned if each.folder == folder]
        edits = [edit for place, each in enumerate(own) for edit in _edits(history, each, place, judged)]
        if edits:
            name = path.relative_to(folder.parents[1]).as_posix()
            lines = [text.splitlines(keepends=True) for text in (before, edit_yaml(before, edits))]
            diffs += difflib.unified_diff(*lines, f"a/{name}", f"b/{name}")
    return "".join(diffs)


def _edits(
    history: History, planned: Planned, place: int, judged: Sequence[JudgedMetric]
) -> list[tuple[tuple[str | int, ...], Any]]:
    """Return the changes to one entry, as paths and values of ``edit_yaml``; a list at a path is what to add to it."""
    edits: list[tuple[tuple[str | int, ...], Any]] = []
    hashes: list[str] = []
    for one in judged:
        if (one.pipeline, one.entry) != (planned.pipeline, planned.entry.name) or one.verdict not in ("red", "yellow"):
            continue
        if one.verdict == "red" and one.changed_rows:
            hashes += [one.changed_rows[:HASH_LENGTH]]
        elif one.metric:
            where = ("entries", place, "bands", one.metric, "expected", one.hardware)
            edits.append((where, float(f"{one.value:.{NUM_DIGITS}g}")))
    if hashes:
        edits.append((("entries", place, "data"), list(dict.fromkeys(hashes))))
    return edits
