"""A folder in which several processes make shards of features: what was planned, what is done, what it holds.

``plan.json`` is there from the start, ``shard-<number>.json`` once the shard of that number is done, and
``manifest.json`` once all are. Importing this module must stay cheap (no torch).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.video.feature_files import FORMAT, MANIFEST, PLAN, VisualError

Record = dict[str, Any]
Bad = list[tuple[str, str]]
"""Names that could not be read, each with the reason."""


@dataclass(frozen=True)
class FeatureFolder:
    """Shards of ``num_shards`` fixed lists of names; any number of processes may work on them at any time."""

    path: Path
    settings: Record
    """What the features depend on besides names and files, as plain JSON values; the manifest repeats it."""
    names: list[str]
    shard_size: int

    @property
    def num_shards(self) -> int:
        """How many lists the names are cut into."""
        return -(-len(self.names) // self.shard_size)

    def names_of(self, number: int) -> list[str]:
        """Return the names of a shard."""
        return self.names[number * self.shard_size : (number + 1) * self.shard_size]

    def begin(self) -> None:
        """Write the plan or, if there is one, raise ``VisualError`` that says in what it differs."""
        plan = {
            "format": FORMAT,
            **self.settings,
            "shard_size": self.shard_size,
            "num_names": len(self.names),
            "names_sha256": hashlib.sha256(json.dumps(self.names).encode()).hexdigest(),
        }
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / PLAN).exists():
            _write_json(self.path / PLAN, plan)
        before, now = _flat(json.loads((self.path / PLAN).read_bytes())), _flat(plan)
        other = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if other:
            differences = "; ".join(f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in other)
            raise VisualError(
                f"{self.path} was begun with other settings: {differences}. Its shards must all be alike. Give the "
                "settings and names it was begun with, or another --output."
            )

    def make(self, number: int, write: Callable[[Path, Bad], Sequence[Path]]) -> Record | None:
        """Have a shard made, unless it is done or in the making elsewhere; return the report on it, if it was made.

        ``write`` is given a folder to write the shard into, and returns its file or, if the shard is empty, none; it
        lists the names that it leaves out.
        """
        stem = _stem(number)
        with self._claimed(stem) as is_ours:
            if not is_ours or self.report(number) is not None:
                return None
            aside = self.path / f".{stem}.partial"
            shutil.rmtree(aside, ignore_errors=True)
            try:
                bad: Bad = []
                files = write(aside, bad)
                report: Record = {"num_samples": len(self.names_of(number)) - len(bad), "bad": bad}
                for file in files:
                    with file.open("rb") as content:
                        report["sha256"] = hashlib.file_digest(content, "sha256").hexdigest()
                    report["num_bytes"] = file.stat().st_size
                    os.replace(file, self.path / f"{stem}.tar")
                _write_json(self.path / f"{stem}.json", report)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            return self.report(number)

    def report(self, number: int) -> Record | None:
        """Return what was written down when a shard was done; None if it was not or is not there as it was."""
        stem = _stem(number)
        path, tar = self.path / f"{stem}.json", self.path / f"{stem}.tar"
        if not path.is_file():
            return None
        report = json.loads(path.read_bytes())
        is_whole = not report["num_samples"] or (tar.is_file() and tar.stat().st_size == report["num_bytes"])
        return report if is_whole else None

    def finish(self, max_bad_fraction: float, **facts: Any) -> Record | None:
        """Write the manifest, with ``facts`` about the features, and return it; None if there are shards to be made.

        Raises ``VisualError``, after that, if more than ``max_bad_fraction`` of the files could not be read.
        """
        reports = [self.report(number) for number in range(self.num_shards)]
        if None in reports:
            return None
        bad = [{"name": name, "reason": reason} for report in reports for name, reason in report["bad"]]
        shards = [
            {"name": f"{_stem(number)}.tar", "num_samples": report["num_samples"], "sha256": report["sha256"]}
            for number, report in enumerate(reports)
            if report["num_samples"]
        ]
        num_samples = sum(shard["num_samples"] for shard in shards)
        manifest = {
            "format": FORMAT,
            **self.settings,
            **facts,
            "num_samples": num_samples,
            "shards": shards,
            "bad": bad,
        }
        _write_json(self.path / MANIFEST, manifest)
        for left in self.path.glob(".shard-*"):
            left.unlink(missing_ok=True) if left.is_file() else shutil.rmtree(left, ignore_errors=True)
        if len(bad) > max_bad_fraction * len(self.names):
            raise VisualError(
                f"{len(bad)} of {len(self.names)} files cannot be read; --max-bad-fraction {max_bad_fraction:g} allows "
                f"{int(max_bad_fraction * len(self.names))}. {self.path / MANIFEST} lists them; the first is "
                f"{bad[0]['name']}: {bad[0]['reason']} Repair the files, delete the .json of their shards, whose "
                '"bad" names them, and run this again; or allow more.'
            )
        return manifest

    @contextlib.contextmanager
    def _claimed(self, stem: str) -> Iterator[bool]:
        """Hold a shard's lock, or yield False: the same job may have been started twice."""
        with (self.path / f".{stem}.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def _stem(number: int) -> str:
    return f"shard-{number:06d}"


def _flat(values: Record, prefix: str = "") -> Record:
    flat: Record = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _write_json(path: Path, value: Record) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
