"""What the pipelines' demos share: announce a step, run a training script under the launcher, sum a run up."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import IO

import torch

from dora_core.config import ConfigError
from dora_core.engine.distributed import free_port
from dora_core.evaluation.results import Metric, read_results
from dora_core.training.metrics import read_metrics

NUM_RANKS = 2
PROGRESS = re.compile(r"\d+%\|.*\d+/\d+ ")


def launch(script: Path, output: Path, name: str, arguments: list[str]) -> None:
    """Run a training script under the ``deepspeed`` launcher; its output goes to a log, its progress bar here too.

    Prints the command and a line on the finished run. Stops the demo if the run fails.
    """
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command = [
        str(deepspeed),
        "--num_gpus",
        str(num_ranks()),
        "--master_port",
        str(free_port()),
        str(script),
        *arguments,
    ]
    command += ["--run.root", str(output), "--run.name", name, "--log.tensorboard", "false"]
    shown = shlex.join(["deepspeed", *command[1:5], os.path.relpath(script)])
    shown += " " + shlex.join(command[6:]).replace(" --", " \\\n    --")
    print(textwrap.indent(shown, "      $ ", lambda line: line.startswith("deepspeed")), flush=True)
    started = time.perf_counter()
    log = output / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.PIPE, env=environment, encoding="utf-8", errors="replace"
        )
        try:
            show_progress(process.stderr, file)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        code = process.wait()
    if code or not (output / name / "metrics.jsonl").is_file():
        print(log.read_text(encoding="utf-8")[-3000:], file=sys.stderr)
        raise ConfigError(f"The run {name} ended with status {code}. Its log is {log}.")
    print("      " + summary(output / name, time.perf_counter() - started), flush=True)


def show_progress(stream: IO[str], log: IO[str]) -> None:
    """Copy a run's standard error to its log; on a terminal, show the progress bar."""
    on_screen = sys.stderr.isatty()
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
    if (folder / "results" / "after").is_dir():
        *_, average = read_results(folder / "results" / "after")
        text += f", {average.metric} {100 * average.value:.1f} %"
    return f"{text}, {seconds:.0f} s"


def num_ranks() -> int:
    """Return two, or one where there is one GPU."""
    return min(NUM_RANKS, torch.cuda.device_count()) if torch.cuda.is_available() else NUM_RANKS


def metrics(folder: Path) -> dict[str, Metric]:
    """Return the metrics in a results folder by name, the first of several that have one: the reported one."""
    found: dict[str, Metric] = {}
    for metric in read_results(folder):
        found.setdefault(metric.name, metric)
    return found


def cell(metric: Metric) -> str:
    """Return a metric in percent with its standard error, for a table."""
    return f"{100 * metric.value:.1f} ± {100 * metric.stderr:.1f}"


def say(step: str, text: str) -> None:
    """Announce a step."""
    print(f"\n[{step}] {text}", flush=True)
