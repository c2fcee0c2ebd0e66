"""One night's folder: what was run in it, how it ended, and going on after an interruption."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from dora_core.config import ConfigError
from dora_core.evaluation.results import replace_file
from dora_core.nightly.plan import Planned
from dora_core.training.folder import lock_folder
from dora_core.training.launcher import launch, launch_command

SETUP_LIMIT_S = 1800.0


class InterruptedNightError(Exception):
    """The running entry was told to stop; the night can go on later."""


@dataclass(frozen=True, kw_only=True)
class EntryResult:
    """How an entry's process ended."""

    problem: str | None
    """Why the entry is broken, or None."""
    seconds: float
    time: str
    """When it ended, UTC, ISO 8601."""


class Night:
    """A folder with ``night.json``, ``<pipeline>/<entry>.log`` and ``.json``, and ``<pipeline>/runs/<entry>/``."""

    def __init__(self, folder: Path, only: str | None) -> None:
        """Begin a night in ``folder``, or go on with the unfinished one there.

        Raises ``ConfigError`` if another process is in it, or the night there is finished or of other entries.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self._lock = lock_folder(self.folder, "give another --output")
        path = self.folder / "night.json"
        if path.is_file():
            self._state = json.loads(path.read_text(encoding="utf-8"))
        else:
            self._state = {"night": f"{now()[:19]}-{secrets.token_hex(3)}", "only": only, "finished": False}
            self._write()
        if self._state["finished"]:
            raise ConfigError(f"{folder} holds a finished night. Give another --output for a new one.")
        if self._state["only"] != only:
            raise ConfigError(
                f"{folder} holds an unfinished night with --only {self._state['only']}; this is --only {only}. Repeat "
                "the command that began it, or give another --output."
            )

    @property
    def name(self) -> str:
        """The night's name: when it began, and a few random letters."""
        return self._state["night"]

    def result(self, planned: Planned) -> EntryResult | None:
        """Return how an entry ended, or None if it has not."""
        path = self._path(planned, ".json")
        return EntryResult(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def record(self, planned: Planned, result: EntryResult) -> None:
        """Note that an entry has ended, so that it is not run again."""
        replace_file(self._path(planned, ".json"), [json.dumps(asdict(result)) + "\n"])

    def run_folder(self, planned: Planned) -> Path:
        """Return where an entry's run is."""
        return self.folder / planned.pipeline / "runs" / planned.entry.name

    def log(self, planned: Planned) -> Path:
        """Return the file with all that an entry's processes print."""
        return self._path(planned, ".log")

    def finish(self) -> None:
        """Note that every entry has ended and the report is written."""
        self._state["finished"] = True
        self._write()

    def close(self) -> None:
        """Let others into the folder."""
        self._lock.close()

    def _path(self, planned: Planned, suffix: str) -> Path:
        folder = self.folder / planned.pipeline
        folder.mkdir(exist_ok=True)
        return folder / f"{planned.entry.name}{suffix}"

    def _write(self) -> None:
        replace_file(self.folder / "night.json", [json.dumps(self._state) + "\n"])


Start = Callable[[Night, Planned], EntryResult]
"""Runs one entry to its end."""


def run_entry(night: Night, planned: Planned) -> EntryResult:
    """Run an entry under the ``deepspeed`` launcher, once, from its last checkpoint if it has one.

    Raises ``InterruptedNightError`` if it was told to stop and saved, and ``KeyboardInterrupt`` if this process was.
    """
    entry = planned.entry
    where = night.folder / planned.pipeline if entry.setup == "prepare" else Path.cwd()
    run = night.run_folder(planned)
    _wait_for(run, entry.time_limit_s)
    if entry.setup == "prepare":
        result = _prepare(planned.pipeline, where, night.log(planned))
        if result is not None:
            return result
    arguments = [*planned.arguments(), "--run.root", str(run.parent), "--run.name", entry.name, "--run.resume", "auto"]
    arguments += ["--log.tensorboard", "false", "--log.progress", "false"]
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with contextlib.chdir(where):
        ended = launch(
            launch_command(planned.script, arguments, entry.ranks),
            night.log(planned),
            time_limit_s=entry.time_limit_s,
            environment=environment,
        )
    if ended.status == "stopped":
        raise InterruptedNightError(planned.name)
    problem = None if ended.status == "finished" else f"ended with status {ended.exit_status}"
    if ended.timed_out:
        problem = f"stopped at its time limit of {entry.time_limit_s:g} s"
    return EntryResult(problem=problem, seconds=ended.seconds, time=now())


def now() -> str:
    """Return the time, UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _prepare(pipeline: str, folder: Path, log: Path) -> EntryResult | None:
    """Fill ``folder/data/world``, once a night; return how it failed, or None."""
    if (folder / "data").is_dir():
        return None
    aside = Path(tempfile.mkdtemp(prefix="prepare-", dir=folder))  # a killed night's may still be written to
    started = time.monotonic()
    command = [sys.executable, "-m", "dora_core.cli", "prepare", pipeline, "data/world"]
    with log.open("a", encoding="utf-8") as file:
        try:
            done = subprocess.run(command, cwd=aside, stdout=file, stderr=subprocess.STDOUT, timeout=SETUP_LIMIT_S)
            problem = f"dora prepare ended with status {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            problem = f"dora prepare took longer than {SETUP_LIMIT_S:g} s"
    if problem is not None:
        return EntryResult(problem=problem, seconds=time.monotonic() - started, time=now())
    os.replace(aside / "data", folder / "data")
    aside.rmdir()
    return None


def _wait_for(run: Path, limit_s: float) -> None:
    """Wait until the run folder is free: processes of a killed night may still be at work in it."""
    if not (run / "run.lock").is_file():
        return
    deadline = time.monotonic() + limit_s
    with (run / "run.lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{run} has been in use by another process for {limit_s:g} s. End it, then go on."
                    ) from None
            time.sleep(0.5)
