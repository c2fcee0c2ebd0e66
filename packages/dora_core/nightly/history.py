"""The history of all nights in one SQLite file, which needs nothing beside it.

``runs`` has one row per finished entry of a night, with its loss curve, settings and provenance; ``measurements`` one
row per metric of it, with the same provenance, its verdict, and its examples, compressed. What is looked up for a
comparison has the same pipeline, entry, metric, hardware and data hash: there is no way to ask for anything else.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dora_core.nightly.measure import Measured, Outcome
from dora_core.nightly.schema import open_database, transaction

PENDING = "pending"
"""The verdict of rows of a night that has not come to its end; they are kept and compared with nothing."""
RED = "red"

_RUN_KEY = "pipeline = ? AND entry = ? AND hardware = ?"


@dataclass(frozen=True, kw_only=True)
class Past:
    """A metric's value on an earlier night."""

    night: str
    time: str
    value: float
    stderr: float | None
    verdict: str
    commit: str


@dataclass(frozen=True, kw_only=True)
class PastRun:
    """An entry's run on an earlier night."""

    night: str
    commit: str
    data_hash: str
    num_rows: int
    config: dict[str, Any]
    versions: dict[str, str]
    curve: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class JudgedMetric:
    """A verdict of the newest night."""

    pipeline: str
    entry: str
    metric: str
    """Empty for the run itself, which stands for its training data."""
    hardware: str
    value: float
    verdict: str
    changed_rows: str
    """Hash of the rows, if they are not those of the last night that was not red; else empty."""


class History:
    """One open file; several processes may have it open."""

    def __init__(self, path: Path) -> None:
        """Open ``path`` as ``open_database`` does, with its errors."""
        self._database = open_database(path)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def add_run(self, night: str, time: str, pipeline: str, entry: str, measured: Measured) -> None:
        """Store a run and its measurements, pending; a run that the night has already is replaced."""
        own = (night, pipeline, entry)
        provenance = {
            **dict(zip(("night", "pipeline", "entry"), own, strict=True)),
            "time": time,
            "commit_hash": measured.commit,
            "hardware": measured.hardware,
            "versions": json.dumps(measured.versions, sort_keys=True),
            "config_hash": measured.config_hash,
            "verdict": PENDING,
        }
        with transaction(self._database):
            for table in ("runs", "measurements"):
                self._database.execute(f"DELETE FROM {table} WHERE night = ? AND pipeline = ? AND entry = ?", own)
            self._insert(
                "runs",
                provenance
                | {
                    "data_hash": measured.data_hash,
                    "num_rows": measured.num_rows,
                    "config": json.dumps(measured.config, sort_keys=True),
                    "curve": _pack(measured.curve),
                },
            )
            for each in measured.measurements:
                values = asdict(each)
                values["outcomes"] = (
                    _pack([list(row.values()) for row in values["outcomes"]]) if each.outcomes else None
                )
                self._insert("measurements", provenance | {**values, "reason": ""})

    def set_verdicts(
        self, night: str, pipeline: str, entry: str, run: str, metrics: Mapping[str, tuple[str, str]]
    ) -> None:
        """Write down the verdict of a run, and verdict and reason of its metrics."""
        where = "night = ? AND pipeline = ? AND entry = ?"
        with transaction(self._database):
            self._database.execute(f"UPDATE runs SET verdict = ? WHERE {where}", (run, night, pipeline, entry))
            for metric, (verdict, reason) in metrics.items():
                self._database.execute(
                    f"UPDATE measurements SET verdict = ?, reason = ? WHERE {where} AND metric = ?",
                    (verdict, reason, night, pipeline, entry, metric),
                )

    def past(self, pipeline: str, entry: str, metric: str, hardware: str, data_hash: str, before: str) -> list[Past]:
        """Return the judged values of a metric on the same hardware and data but for night ``before``, oldest first."""
        rows = self._database.execute(
            f"SELECT night, time, value, stderr, verdict, commit_hash FROM measurements WHERE {_RUN_KEY} "
            "AND metric = ? AND data_hash = ? AND night != ? AND verdict != ? ORDER BY time, rowid",
            (pipeline, entry, hardware, metric, data_hash, before, PENDING),
        )
        names = ("night", "time", "value", "stderr", "verdict", "commit")
        return [Past(**dict(zip(names, row, strict=True))) for row in rows]

    def outcomes(self, night: str, pipeline: str, entry: str, metric: str) -> list[Outcome]:
        """Return the examples of one measurement; none if it has none."""
        row = self._database.execute(
            "SELECT outcomes FROM measurements WHERE night = ? AND pipeline = ? AND entry = ? AND metric = ?",
            (night, pipeline, entry, metric),
        ).fetchone()
        return [Outcome(*each) for each in _unpack(row[0])] if row and row[0] else []

    def past_runs(self, pipeline: str, entry: str, hardware: str, before: str) -> list[PastRun]:
        """Return the runs of an entry on the same hardware that were judged and are not red, oldest first."""
        rows = self._database.execute(
            f"SELECT night, commit_hash, data_hash, num_rows, config, versions, curve FROM runs WHERE {_RUN_KEY} "
            "AND night != ? AND verdict NOT IN (?, ?) ORDER BY time, rowid",
            (pipeline, entry, hardware, before, PENDING, RED),
        )
        return [
            PastRun(
                night=night,
                commit=commit,
                data_hash=data_hash,
                num_rows=num_rows,
                config=json.loads(config),
                versions=json.loads(versions),
                curve=[tuple(point) for point in _unpack(curve)],
            )
            for night, commit, data_hash, num_rows, config, versions, curve in rows
        ]

    def metrics_of(self, night: str, pipeline: str, entry: str) -> dict[str, tuple[str, int]]:
        """Return the metrics that a run has, with hash and number of their evaluation rows."""
        rows = self._database.execute(
            "SELECT metric, evaluation_hash, n FROM measurements WHERE night = ? AND pipeline = ? AND entry = ?",
            (night, pipeline, entry),
        )
        return {metric: (evaluation_hash, n) for metric, evaluation_hash, n in rows}

    def newest_night(self) -> list[JudgedMetric]:
        """Return the verdicts of the newest night that came to its end, runs before their metrics."""
        newest = "night = (SELECT night FROM runs WHERE verdict != ? ORDER BY time DESC, rowid DESC LIMIT 1)"
        names = ("pipeline", "entry", "hardware", "verdict", "night")
        judged = []
        for *key, verdict, night, data_hash in self._database.execute(
            f"SELECT {', '.join(names)}, data_hash FROM runs WHERE {newest} ORDER BY rowid", (PENDING,)
        ).fetchall():
            past = self.past_runs(*key, night)
            own = dict(zip(names, key, strict=False))
            changed = data_hash if past and past[-1].data_hash != data_hash else ""
            judged.append(JudgedMetric(**own, metric="", value=0.0, verdict=verdict, changed_rows=changed))
            before = self.metrics_of(past[-1].night, *key[:2]) if past else {}
            for metric, value, verdict, evaluation_hash in self._database.execute(
                "SELECT metric, value, verdict, evaluation_hash FROM measurements "
                "WHERE night = ? AND pipeline = ? AND entry = ? ORDER BY rowid",
                (night, *key[:2]),
            ):
                same = before.get(metric, (evaluation_hash, 0))[0] == evaluation_hash
                changed = "" if same else evaluation_hash
                judged.append(JudgedMetric(**own, metric=metric, value=value, verdict=verdict, changed_rows=changed))
        return judged

    def _insert(self, table: str, values: Mapping[str, Any]) -> None:
        places = ", ".join("?" * len(values))
        self._database.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({places})", tuple(values.values()))


def _pack(rows: Sequence[Any]) -> bytes:
    return zlib.compress(json.dumps(rows, ensure_ascii=False).encode(), 9)


def _unpack(packed: bytes) -> list[Any]:
    return json.loads(zlib.decompress(packed))
