"""What the training benchmarks share: run a recipe under the ``deepspeed`` launcher and read its figures."""

from __future__ import annotations

import itertools
import platform
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "packages"), str(ROOT)]

import torch

from dora_core.training.environment import processor_name
from dora_core.training.launcher import launch, launch_command
from dora_core.training.metrics import read_metrics

TOTALS = {"num_images"}


def run_recipe(
    pipeline: str,
    recipe: str,
    overrides: Mapping[str, Any],
    output: Path,
    name: str,
    warmup: int,
    num_gpus: int | None = None,
) -> dict:
    """Run a recipe as run ``name`` below ``output``; return its figures, or ``error`` and the log's end.

    What an earlier run left there goes, unless ``run.resume`` is overridden. Without ``num_gpus`` it runs on all;
    without a GPU they are ranks on the CPU.

    Medians and interquartile ranges are over the steps after ``warmup``.
    """
    settings = {
        "train.log_every": 1,
        "log.tensorboard": "false",
        "log.progress": "false",
        "run.root": output,
        "run.name": name,
        **overrides,
    }
    arguments = ["--config", recipe, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]
    script = ROOT / "pipelines" / pipeline / "train.py"
    command = launch_command(script, arguments, num_gpus or max(1, torch.cuda.device_count()))
    log = output / f"{name}.log"
    log.unlink(missing_ok=True)
    if "run.resume" not in overrides:
        shutil.rmtree(output / name, ignore_errors=True)
    result = launch(command, log)
    metrics = output / name / "metrics.jsonl"
    if result.status != "finished" or not metrics.is_file():
        return {"error": f"status {result.exit_status}", "log": log.read_text()[-2000:]}
    rows = [row for row in read_metrics(metrics) if "loss" in row]
    for before, row in reversed(list(itertools.pairwise(rows))):
        for key in TOTALS & row.keys():  # as logged: since the run began
            row[key] -= before[key]
    steady = [row for row in rows if row["step"] > warmup]
    figures: dict[str, Any] = {"num_steps": len(steady)}
    for key in ("step_time_s", "tokens_per_s", "num_images"):
        values = [row[key] for row in steady if key in row]
        if values:
            figures |= {key: statistics.median(values), f"{key}_iqr": iqr(values)}
    figures["step_times_s"] = [row["step_time_s"] for row in steady]  # runs on the same rows compare step by step
    figures["data_wait"] = statistics.median(row["data_wait"] for row in steady)
    figures["largest_data_wait"] = max(row["data_wait"] for row in steady)
    figures["peak_gib"] = max(row.get("peak_gib", 0.0) for row in rows)
    return figures | {"first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"]}


def environment() -> dict:
    """Return hardware and versions."""
    import deepspeed
    import transformers

    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        "num_gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "deepspeed": deepspeed.__version__,
    }


def iqr(values: Sequence[float]) -> float:
    """Return the interquartile range; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return high - low
