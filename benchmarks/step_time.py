"""Time whole training steps of a LLaMA with PEFT's adapters and with ours, next to the frozen model alone.

    python benchmarks/step_time.py [--regimes 8x2048-ckpt-r32,1x4096-ckpt-r384] [--variants peft-lora,ours-dora]
    python benchmarks/step_time.py --plot-only

A step is forward, backward, fused AdamW (its plain form on a CPU) and ``zero_grad`` on random tokens, with labels =
input ids through the model's own loss. ``floor`` is the frozen model without an adapter or optimizer. In every variant,
the floor included, the embedding's output requires grad, so all layers compute their input's gradient. Adapters are on
q, k, v, up and down with alpha 2 r; in the model's type except in ``ours-dora-fp32``, no autocast; B is random and
magnitudes are moved. One model is built, and adapters are put in and taken out again: the floor's loss must be the same
to the bit before and after all others, and ``drift`` is the floor's last time over its first. With ``--rounds`` the
whole list repeats, and ratios are taken within a round. ``extra_gib`` is peak memory above the loaded model with its
adapters. ``host_ms`` is the median time of five more steps on 16 tokens, in which Python and the launches take longer
than the GPU: a step cannot be faster.
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
from measuring import (
    RESULTS,
    Memory,
    Regime,
    figures_or_error,
    require_known,
    settings,
    table,
    time_steps,
    versions,
    write_json,
)
from step_time_plot import plot
from training_runs import iqr
from transformers import PreTrainedModel

REGIMES = "8x2048-ckpt-r32,2x2048-r32,1x2048-ckpt-r32,1x4096-ckpt-r128,1x4096-ckpt-r384"
DEFAULT_VARIANTS = (
    "peft-lora,peft-dora,ours-lora,ours-dora,ours-dora-kept,ours-dora-offloaded,"
    "ours-dora-fp32,ours-dora-plain,ours-dora-dropout"
)
FEW_TOKENS = 16
MAX_STEPS = 40
COLUMNS = {
    "regime": "",
    "variant": "",
    "median_ms": ".1f",
    "iqr_ms": ".1f",
    "ratio_to_floor": ".3f",
    "ratio_to_peft_lora": ".3f",
    "extra_gib": ".2f",
    "host_ms": ".1f",
    "num_steps": "d",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every regime and variant, or only plot; return 1 if a variant failed or the base was changed."""
    own = parse(arguments)
    path = own.output / f"{own.name}.json"
    if own.plot_only:
        plot(path)
        return 0
    device = torch.device(own.device)
    shape = Shape(own.layers, own.hidden, own.mlp, own.heads, own.vocab)
    model = build_model(shape, DTYPES[own.dtype], device)
    content: dict[str, Any] = {"environment": versions(), "settings": settings(own), "rows": [], "summary": []}
    for regime in map(Regime.parse, own.regimes.split(",")):
        for round_number in range(1, own.rounds + 1):
            for variant in ["floor", *own.variants.split(","), "floor-again"]:
                row = {"regime": regime.name, "round": round_number, "variant": variant}
                work = partial(measure, model, variant, regime, own, device)
                content["rows"].append(row | figures_or_error(work, device))
                content["rows"] = with_ratios(content["rows"])
                content["summary"] = summary(content["rows"])
                write_json(path, content)
                print(content["rows"][-1], flush=True)
    print(table(content["rows"] if own.rounds == 1 else content["summary"], COLUMNS))
    plot(path)
    unchanged = [facts["base_unchanged"] for facts in content["summary"] if "base_unchanged" in facts]
    print(f"base unchanged: {all(unchanged)}; failed: {sum('error' in row for row in content['rows'])}")
    return int(not all(unchanged) or any("error" in row for row in content["rows"]))


def measure(
    model: PreTrainedModel, name: str, regime: Regime, own: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Return the figures of one variant."""
    torch.manual_seed(0)
    input_ids = regime.input_ids(model.config.vocab_size, device)
    losses = []
    variant = VARIANTS[name.removesuffix("-again")]
    with (
        input_gradients(model),
        adapted(model, variant, regime.rank) as called,
        checkpointed(model, regime.checkpointing, variant.kept_outputs),
    ):
        parameters = [parameter for parameter in called.parameters() if parameter.requires_grad]
        memory = Memory(device)
        train = training_step(called, device)

        def step(input_ids: torch.Tensor = input_ids) -> None:
            losses.append(train(input_ids))

        (one,) = time_steps(step, device, own.warmup, 1)
        num_steps = max(own.repeats, min(MAX_STEPS, int(own.seconds * 1e3 / one)))
        milliseconds = time_steps(step, device, 0, num_steps)
        extra_gib, last_loss = memory.extra_gib(), losses[-1].item()
        short = time_steps(partial(step, input_ids[:1, :FEW_TOKENS]), device, 2, 5)
        return {
            "median_ms": statistics.median(milliseconds),
            "iqr_ms": iqr(milliseconds),
            "extra_gib": extra_gib,
            "host_ms": statistics.median(short),
            "num_steps": num_steps,
            "num_trainable": sum(parameter.numel() for parameter in parameters),
            "first_loss": losses[0].item(),
            "last_loss": last_loss,
        }


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with their ratios to the floor (the mean of both) and to PEFT's LoRA of the same round."""

    def reference(row: dict[str, Any], *names: str) -> float | None:
        known = [
            other["median_ms"]
            for other in rows
            if other["variant"] in names
            and (other["regime"], other["round"]) == (row["regime"], row["round"])
            and "median_ms" in other
        ]
        return statistics.fmean(known) if known else None

    done = []
    for row in rows:
        for key, names in (("floor", ("floor", "floor-again")), ("peft_lora", ("peft-lora",))):
            base = reference(row, *names)
            known = base is not None and "median_ms" in row
            row = {**row, f"ratio_to_{key}": row["median_ms"] / base if known else None}
        done.append(row)
    return done


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return medians over rounds for every regime and variant; the last floor's row also tells of drift and the base.

    ``ratio_to_floor_range`` is the least and the greatest of the rounds.
    """
    found = []
    for regime, variant in dict.fromkeys((row["regime"], row["variant"]) for row in rows):
        chosen = [row for row in rows if (row["regime"], row["variant"]) == (regime, variant) and "error" not in row]
        if not chosen:
            continue
        line: dict[str, Any] = {"regime": regime, "variant": variant, "num_rounds": len(chosen)}
        for key in [*COLUMNS][2:]:
            values = [row[key] for row in chosen if row[key] is not None]
            line[key] = statistics.median(values) if values else None
        ratios = [row["ratio_to_floor"] for row in chosen if row["ratio_to_floor"] is not None]
        line["ratio_to_floor_range"] = [min(ratios), max(ratios)] if ratios else None
        line["num_steps"] = sum(row["num_steps"] for row in chosen)
        if variant == "floor-again":
            floors = {row["round"]: row for row in rows if (row["regime"], row["variant"]) == (regime, "floor")}
            pairs = [(floors[row["round"]], row) for row in chosen if "error" not in floors[row["round"]]]
            line["base_unchanged"] = all(first["first_loss"] == last["first_loss"] for first, last in pairs)
            line["drift"] = [last["median_ms"] / first["median_ms"] for first, last in pairs]
        found.append(line)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ``--tiny`` replaces sizes by some that a CPU does in seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regimes", default=REGIMES, help="any ROWSxTOKENS[-ckpt]-rRANK, separated by commas")
    parser.add_argument("--variants", default=DEFAULT_VARIANTS)
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=8, help="timed steps, at least")
    parser.add_argument("--seconds", type=float, default=3.0, help="of short steps, time more of them, up to 40")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default="step_time", help="of the files, without their endings")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--plot-only", action="store_true")
    own = parser.parse_args(arguments)
    if own.tiny:
        vars(own).update(vars(TINY), warmup=1, repeats=2, seconds=0.0, regimes="2x32-ckpt-r4,1x16-r8", dtype="float32")
    require_known("variants", own.variants, VARIANTS, parser)
    return own


if __name__ == "__main__":
    sys.exit(main())
