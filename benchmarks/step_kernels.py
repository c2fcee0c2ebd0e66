"""Where the GPU's time goes in a training step: milliseconds and launches by kernel.

    python benchmarks/step_kernels.py [--regimes 8x2048-ckpt-r32,6x2048-ckpt-r128] [--variants floor,ours-dora]

The model, its variants and the step are those of ``step_time.py``. ``median_ms`` is of 4 steps after 3; ``kernels`` of
the two after these, under torch's profiler, per step and in the order of their time: [ms, launches].
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adapter_variants import (
    DTYPES,
    TINY,
    VARIANTS,
    Shape,
    adapted,
    build_model,
    checkpointed,
    input_gradients,
    training_step,
)
from measuring import RESULTS, Regime, figures_or_error, require_known, settings, time_steps, versions, write_json
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

WARMUP, TIMED, PROFILED = 3, 4, 2
MOST, LONGEST = 60, 100
"""Kernels of a step that are named, and letters of a name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile every regime and variant; return 1 if one failed."""
    own = parse(arguments)
    device = torch.device(own.device)
    model = build_model(TINY if own.tiny else Shape(), DTYPES[own.dtype], device)
    rows: list[dict[str, Any]] = []
    for regime in map(Regime.parse, own.regimes.split(",")):
        for variant in own.variants.split(","):
            work = partial(measure, model, variant, regime, device)
            rows.append({"regime": regime.name, "variant": variant} | figures_or_error(work, device))
            write_json(
                own.output / f"{own.name}.json", {"environment": versions(), "settings": settings(own), "rows": rows}
            )
            print({key: value for key, value in rows[-1].items() if key != "kernels"}, flush=True)
    return int(any("error" in row for row in rows))


def measure(model: PreTrainedModel, name: str, regime: Regime, device: torch.device) -> dict[str, Any]:
    """Return the figures of one variant."""
    variant, input_ids = VARIANTS[name], regime.input_ids(model.config.vocab_size, device)
    with (
        input_gradients(model),
        adapted(model, variant, regime.rank) as called,
        checkpointed(model, regime.checkpointing, variant.kept_outputs),
    ):
        step = partial(training_step(called, device), input_ids)
        milliseconds = time_steps(step, device, WARMUP, TIMED)
        activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities=[activity]) as done:
            for _ in range(PROFILED):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
        attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        kernels: dict[str, list[float]] = {}
        for event in done.key_averages():
            known = kernels.setdefault(event.key[:LONGEST], [0.0, 0])
            known[0] += getattr(event, attribute) / 1e3 / PROFILED
            known[1] += event.count // PROFILED
        longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:MOST]
        return {
            "median_ms": statistics.median(milliseconds),
            "kernels_ms": sum(time for time, _ in kernels.values()),
            "kernels": {name: [round(time, 3), count] for name, (time, count) in longest},
        }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ``--tiny`` replaces sizes by some that a CPU does in seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regimes", default="8x2048-ckpt-r32,6x2048-ckpt-r128")
    parser.add_argument("--variants", default="floor,ours-lora,ours-dora,ours-dora-kept,ours-dora-dropout")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default="step_kernels", help="of the file, without its ending")
    parser.add_argument("--tiny", action="store_true")
    own = parser.parse_args(arguments)
    if own.tiny:
        own.regimes, own.dtype = "2x32-ckpt-r4", "float32"
    require_known("variants", own.variants, VARIANTS, parser)
    return own


if __name__ == "__main__":
    sys.exit(main())
