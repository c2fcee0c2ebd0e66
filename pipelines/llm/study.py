"""The paper's weight-decomposition study on the made-up world: ``dora analyze --study llm``.

Full fine-tuning, LoRA and DoRA start from one base model, with several seeds each. The accuracy and the correlation of
magnitude with direction change come out, with intervals and whatever they are, beside those of the paper (section 3.2
and 4.1: VL-BART on image-text tasks, query matrices, six layers at four steps, one run).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dora_core.analysis.command import analyze
from dora_core.analysis.correlation import Correlation
from dora_core.config import require
from dora_core.sweep.spread import Difference, difference_over_seeds, spread
from dora_core.testing.demo import launch, metrics, say
from dora_core.training.environment import describe_environment
from dora_core.training.jobs import run_jobs
from pipelines.llm.demo import FINE_TUNING, METHODS
from pipelines.llm.prepare import prepare

PAPER = {"full": -0.62, "lora": 0.83, "dora": -0.31}
"""Correlation of ΔM with ΔD in Figure 2 of arXiv 2402.09353."""
ROLE = "q_proj"
NUM_CHECKPOINTS = 4


def main(arguments: Sequence[str]) -> None:
    """Train what is missing in ``--output``, analyze and report; called again, it goes on where it was."""
    parser = argparse.ArgumentParser(prog="dora analyze --study llm", allow_abbrev=False, description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/study/llm"))
    parser.add_argument("--seeds", default="0,1,2", help="whole numbers, separated by commas")
    parser.add_argument("--steps", type=int, default=480, help="of fine-tuning; a checkpoint at each quarter")
    parser.add_argument("--base-steps", type=int, default=1500, help="of pre-training the base model")
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--base-lr", default="1e-3", help="learning rate of pre-training")
    parser.add_argument("--full-lr", default="5e-4", help="of full fine-tuning")
    parser.add_argument("--adapter-lr", default="5e-3", help="of LoRA and DoRA")
    parser.add_argument("--jobs", type=int, default=1, help="runs of fine-tuning at once, which take the GPUs in turn")
    parser.add_argument(
        "--overrides", nargs=argparse.REMAINDER, default=[], help="for every run: --section.field value"
    )
    own = parser.parse_args(arguments)
    require(
        own.steps > 0 and own.steps % NUM_CHECKPOINTS == 0,
        "--steps",
        own.steps,
        f"a multiple of {NUM_CHECKPOINTS}",
        "Round it.",
    )
    require(own.jobs >= 1, "--jobs", own.jobs, "1 or more")
    seeds = own.seeds.split(",")
    require(all(seed.isdecimal() for seed in seeds), "--seeds", own.seeds, "whole numbers", "Write for example 0,1,2.")
    started = time.perf_counter()
    run = partial(launch, Path(__file__).with_name("train.py"), own.output)
    world, base = own.output / "world", own.output / "base" / "model"
    if not (world / "model").is_dir():
        say("1/4", "make up the world and a random LLaMA")
        prepare(world, hidden=own.hidden, layers=own.layers, heads=own.heads)
    if not base.is_dir():
        say("2/4", "pre-train the base model")
        options = ["--config", "tiny_base", "--model.path", str(world / "model"), "--run.resume", "auto"]
        options += ["--data.train", f"[{world / 'statements.json'}]", "--train.max_steps", str(own.base_steps)]
        options += ["--train.lr", own.base_lr]
        run("base", [*options, *own.overrides])
    say("3/4", f"fine-tune it with {len(METHODS)} methods and {len(seeds)} seeds")
    jobs = []
    for method, (_, options) in METHODS.items():
        lr = own.full_lr if method == "full" else own.adapter_lr
        for seed in seeds:
            if (own.output / f"{method}-{seed}" / "results" / "after" / "results.json").is_file():
                continue
            options = [*fine_tuning(own.steps), *options, "--train.lr", lr, "--run.seed", seed, "--adapter.seed", seed]
            options += ["--config", "tiny", "--model.path", str(base), "--evaluate.path", str(world)]
            options += ["--data.train", f"[{world / 'commonsense_mix.json'}]", "--run.resume", "auto"]
            jobs.append(partial(run, f"{method}-{seed}", [*options, *own.overrides]))
    run_jobs(jobs, own.jobs, lambda _: None)
    say("4/4", "analyze the checkpoints")
    states = [
        f"{method}={own.output / f'{method}-{seed}' / 'checkpoints' / f'step-{step:08d}'}"
        for method in METHODS
        for seed in seeds
        for step in quarters(own.steps)  # a run that was stopped and resumed has more
    ]
    found, within = analyze(str(base), states, own.output / "analysis", pattern=r"\.(q|k|v|up|down)_proj\.")
    accuracies = {m: [_average(own.output / f"{m}-{seed}") for seed in seeds] for m in METHODS}
    print("\n" + write_report(own, accuracies, found, within, time.perf_counter() - started))


def quarters(num_steps: int) -> range:
    """Return the steps at which weights are compared."""
    every = num_steps // NUM_CHECKPOINTS
    return range(every, num_steps + 1, every)


def fine_tuning(num_steps: int) -> list[str]:
    """Return the demo's fine-tuning with checkpoints at each quarter, all of which are kept."""
    options = dict(zip(FINE_TUNING[::2], FINE_TUNING[1::2], strict=True))
    options |= {"--train.max_steps": str(num_steps), "--train.save_every": str(quarters(num_steps).step)}
    options |= {"--train.keep_last": str(num_steps), "--train.keep_best": "false"}
    options |= {"--train.warmup_steps": str(max(1, num_steps // 24)), "--evaluate.after_training": "true"}
    return [word for pair in options.items() for word in pair]


def write_report(
    own: argparse.Namespace,
    accuracies: Mapping[str, Sequence[float]],
    found: Mapping[tuple[str, str], Correlation],
    within: Mapping[tuple[str, str], Correlation],
    seconds: float,
) -> str:
    """Write ``study.json`` and ``study.md`` and return the table: per method, what this world says and the paper."""
    lines = [
        "| method | accuracy, % (sd over seeds) | minus LoRA, points [95 %] | correlation of ΔM with ΔD, query [95 %] "
        "| within steps [95 %] | paper |",
        "|---|---|---|---|---|---|",
    ]
    records: list[dict[str, Any]] = []
    for method, values in accuracies.items():
        accuracy = spread(values)
        differences = [a - b for a, b in zip(values, accuracies["lora"], strict=True)]
        to_lora = Difference(n=1, mean=differences[0], interval="none: one seed")
        if len(differences) > 1:
            to_lora = difference_over_seeds(differences)
        key = (method, ROLE)
        sd = "" if accuracy.sd is None else f" ({100 * accuracy.sd:.1f})"
        cells = [METHODS[method][0], f"{100 * accuracy.mean:.1f}{sd}", "-" if method == "lora" else _points(to_lora)]
        lines.append("| " + " | ".join([*cells, str(found[key]), str(within[key]), f"{PAPER[method]:+.2f}"]) + " |")
        record = {"method": method, "accuracies": list(values), "minus_lora": asdict(to_lora), "paper": PAPER[method]}
        roles = {role: (found[m, role], within[m, role]) for m, role in found if m == method}
        record["correlations"] = {r: {"all": asdict(a), "within_steps": asdict(b)} for r, (a, b) in roles.items()}
        records.append(record)
    settings = {key: value for key, value in vars(own).items() if key != "output"}
    content = {"environment": describe_environment(1), "settings": settings, "seconds": seconds, "methods": records}
    (own.output / "study.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    table = "\n".join(lines)
    (own.output / "study.md").write_text(table + "\n", encoding="utf-8")
    return table


def _points(difference: Difference) -> str:
    interval = "" if difference.low is None else f" [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return f"{100 * difference.mean:+.1f}{interval}"


def _average(run: Path) -> float:
    return metrics(run / "results" / "after")["llm/average"].value
