"""What the pipelines' demos share: announce a step, run a training script under the launcher, sum a run up."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
from pathlib import Path

import torch

from dora_core.config import ConfigError
from dora_core.evaluation.results import Metric, read_results
from dora_core.training import launcher

NUM_RANKS = 2


def launch(
    script: Path,
    output: Path,
    name: str,
    arguments: list[str],
    place: int = 0,
    stop: launcher.Stop | None = None,
) -> None:
    """Run a training script under the ``deepspeed`` launcher; its output goes to a log, its progress bar here too.

    Prints the command and a line on the finished run. Stops the demo if the run fails. ``place`` and ``stop`` are those
    of ``dora_core.training.jobs``.
    """
    arguments = [*arguments, "--run.root", str(output), "--run.name", name, "--log.tensorboard", "false"]
    command = launcher.launch_command(script, arguments, num_ranks(), place)
    begin = command.index(str(script))
    shown = shlex.join(["deepspeed", *command[begin - 4 : begin], os.path.relpath(script)])
    shown += " " + shlex.join(arguments).replace(" --", " \\\n    --")
    print(textwrap.indent(shown, "      $ ", lambda line: line.startswith("deepspeed")), flush=True)
    result = launcher.launch(command, output / f"{name}.log", environment={"OMP_NUM_THREADS": "1"}, stop=stop)
    if result.status != "finished" or not (output / name / "metrics.jsonl").is_file():
        print(result.log.read_text(encoding="utf-8")[-3000:], file=sys.stderr)
        raise ConfigError(f"The run {name} ended with status {result.exit_status}. Its log is {result.log}.")
    print(f"      {name}: " + launcher.summary(output / name, result.seconds), flush=True)


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
