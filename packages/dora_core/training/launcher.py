"""Run a training script under the ``deepspeed`` launcher as a child: log, progress bar, time limit, a clean stop."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from dora_core.config import ConfigError
from dora_core.engine.distributed import free_port
from dora_core.engine.peers import EXIT_STOPPED
from dora_core.evaluation.results import RESULTS_FILE, read_results
from dora_core.training.metrics import read_metrics

PROGRESS = re.compile(r"\d+%\|.*\d+/\d+ ")
PATIENCE_S = 300.0
"""How long ranks that are told to stop may take to save before they are killed."""


@dataclass(frozen=True, kw_only=True)
class LaunchResult:
    """How a launched script ended."""

    exit_status: int
    """The launcher's; negative for the signal that ended it."""
    seconds: float
    timed_out: bool
    log: Path

    @property
    def status(self) -> str:
        """``finished``, ``timed out``, ``stopped`` (told to, saved, can be resumed) or ``failed``."""
        if self.timed_out:
            return "timed out"
        return {0: "finished", EXIT_STOPPED: "stopped"}.get(self.exit_status, "failed")


@dataclass(frozen=True, kw_only=True)
class Stop:
    """What tells launches in other threads to end: signals reach the main thread alone."""

    asked: threading.Event = field(default_factory=threading.Event)
    """Save and stop."""
    at_once: threading.Event = field(default_factory=threading.Event)
    """Do not wait for the saving."""


def training_script(package: str) -> Path | str:
    """Return what to launch of a pipeline's package: ``train.py``, which finds its checkout by itself, or the module.

    The module where the package is not one of ``pipelines`` but of a distribution of its own.
    """
    module = f"{package}.train"
    return Path(importlib.util.find_spec(module).origin) if package.startswith("pipelines.") else module


def launch_command(script: Path | str, arguments: Sequence[str], num_ranks: int, place: int = 0) -> list[str]:
    """Return the command that runs ``script``, a file or a module's name, on ``num_ranks`` ranks here, on a free port.

    Of launches that run at once each has its ``place``, 0, 1, ..., and they take the GPUs in turn. Where
    CUDA_VISIBLE_DEVICES numbers GPUs, those are named: ``--num_gpus`` would make the launcher ignore that variable and
    take the machine's first GPUs.
    """
    executable = Path(sys.executable).with_name("deepspeed")
    command = [str(executable)] if executable.is_file() else [sys.executable, "-m", "deepspeed.launcher.runner"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if place and visible == [""]:
        visible = [str(device) for device in range(torch.cuda.device_count())]
    are_numbers = all(device.isdigit() for device in visible)
    if place and not are_numbers:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES is {','.join(visible)!r}; several runs at once share GPUs by number. Give numbers, "
            "or run one at a time."
        )
    if torch.cuda.is_available() and are_numbers:
        ranks = range(place * num_ranks, place * num_ranks + min(num_ranks, len(visible)))
        command += ["--include", "localhost:" + ",".join(visible[rank % len(visible)] for rank in ranks)]
    else:
        command += ["--num_gpus", str(num_ranks)]
    command += ["--master_port", str(free_port())]
    return [*command, *([str(script)] if isinstance(script, Path) else ["--module", script]), *arguments]


def launch(
    command: Sequence[str],
    log: Path,
    *,
    time_limit_s: float | None = None,
    environment: Mapping[str, str] | None = None,
    patience_s: float = PATIENCE_S,
    stop: Stop | None = None,
) -> LaunchResult:
    """Run a launcher's ``command`` and return how it ended; what it prints is added to ``log``, its bar shown here too.

    ``environment`` is added to this process's. The command is a process group of its own. After ``time_limit_s``
    seconds, and when this process gets Ctrl-C, SIGTERM or SIGHUP, which raise ``KeyboardInterrupt`` here, its ranks
    are told to save and stop; those that take longer than ``patience_s``, or another Ctrl-C, are killed. ``stop`` does
    the same from another thread. Nothing is left running in any case.
    """
    started = time.monotonic()
    timed_out = False
    stop = stop or Stop()
    on_screen = sys.stderr.isatty() and threading.current_thread() is threading.main_thread()  # several bars are none
    with log.open("a", encoding="utf-8") as file, signals_interrupt():
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C in a terminal reaches this process alone, which passes it on once
        )
        reader = threading.Thread(target=show_progress, args=(process.stderr, file, on_screen), daemon=True)
        reader.start()
        try:
            while process.poll() is None and not timed_out:
                if stop.asked.wait(0.05):
                    raise KeyboardInterrupt
                timed_out = time_limit_s is not None and time.monotonic() - started > time_limit_s
        finally:
            try:
                if process.returncode != 0:
                    _stop_group(process.pid, patience_s, stop.at_once)
            finally:
                process.wait()
                reader.join(10)  # what left the group, as services of loggers do, may hold the pipe open
    seconds = time.monotonic() - started
    return LaunchResult(exit_status=process.returncode, seconds=seconds, timed_out=timed_out, log=log)


def show_progress(stream: IO[str], log: IO[str], on_screen: bool) -> None:
    """Copy a run's standard error to its log; ``on_screen``, show the progress bar."""
    for line in stream:  # universal newlines: every state of the bar is a line
        log.write(line)
        log.flush()
        if on_screen and PROGRESS.search(line):
            print("\r      " + line.strip()[:110].ljust(110), end="", file=sys.stderr, flush=True)
    if on_screen:
        print("\r" + " " * 120 + "\r", end="", file=sys.stderr, flush=True)


def summary(folder: Path, seconds: float) -> str:
    """Return one line on a finished run."""
    rows = read_metrics(folder / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    text = f"{rows[-1]['step']} steps, training loss {losses[0]:.2f} -> {losses[-1]:.2f}"
    if (folder / "results" / "after" / RESULTS_FILE).is_file():
        *_, average = read_results(folder / "results" / "after")
        text += f", {average.metric} {100 * average.value:.1f} %"
    return f"{text}, {seconds:.0f} s"


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise ``KeyboardInterrupt`` meanwhile: their default ends this process and no other."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()  # Python sets handlers in this thread only
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)} if in_main else {}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # nohup
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_group(group: int, patience_s: float, at_once: threading.Event) -> None:
    """End all processes of a launcher's group: ranks asked first, so that they save.

    The launcher and its children, which start the ranks, are killed at once: told to stop, a node launcher of
    DeepSpeed kills ranks that take longer than 30 s to save.
    """
    told: set[int] = set()
    deadline = time.monotonic() + patience_s
    try:
        while (members := _members(group)) and time.monotonic() < deadline and not at_once.is_set():
            for pid in members.keys() - told:
                _send(pid, signal.SIGKILL if group in (pid, members[pid]) else signal.SIGTERM)
            told |= members.keys()
            time.sleep(0.1)
    finally:
        for pid in _members(group):
            _send(pid, signal.SIGKILL)


def _members(group: int) -> dict[int, int]:
    """Return the living processes of a group with their parents."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, own_group = file.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(own_group) == group and state not in "ZX":
            found[int(file.parent.name)] = int(parent)
    return found


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
