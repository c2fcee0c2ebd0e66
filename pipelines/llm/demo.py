"""The LLM pipeline's slice of ``make demo``: world, base, three ways of fine-tuning, scores, merge, table and plots."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dora_core.config import ConfigError
from dora_core.data.rows import read_rows
from dora_core.evaluation.results import Metric, read_results
from dora_core.testing.tiny import save_tiny_llama
from dora_core.testing.world import write_world
from dora_core.training.metrics import plot_accuracies, plot_losses
from pipelines.llm.config import COMMONSENSE
from pipelines.llm.merge import merge

NUM_RANKS = 2
METHODS = {
    "full": ["--adapter.kind", "full", "--adapter.targets", ".*", "--train.lr", "1e-3"],
    "lora": ["--adapter.kind", "lora"],
    "dora": ["--adapter.kind", "dora"],
}
TRAIN = Path(__file__).with_name("train.py")


def main(arguments: Sequence[str]) -> None:
    """Run the demo in ``--output``; what it leaves there can be looked at, resumed and loaded with PEFT."""
    parser = argparse.ArgumentParser(prog="dora demo llm")
    parser.add_argument("--output", type=Path, default=Path("runs/demo/llm"))
    output = parser.parse_args(arguments).output
    started = time.perf_counter()
    shutil.rmtree(output, ignore_errors=True)
    world = output / "world"
    say("1/6", f"a world of made-up people, and a random LLaMA with its own tokenizer, in {world}")
    write_world(world)
    texts = [
        row["instruction"] + "\n" + row["output"]
        for name in ("statements", "commonsense_mix")
        for row in read_rows(str(world / f"{name}.json"))
    ]
    save_tiny_llama(output / "random", texts)

    say("2/6", "pre-train it on plain statements: the base model")
    launch(
        output,
        "base",
        [
            "--config",
            "tiny_base",
            "--model.path",
            str(output / "random"),
            "--data.train",
            f"[{world / 'statements.json'}]",
        ],
    )
    base = output / "base" / "model"
    for place, (method, options) in enumerate(METHODS.items(), 3):
        say(
            f"{place}/6",
            f"fine-tune the base on the eight tasks: {method}, and score it on facts it was never asked about",
        )
        data = ["--data.train", f"[{world / 'commonsense_mix.json'}]", "--evaluate.path", str(world)]
        scoring = ["--evaluate.after_training", "true", "--evaluate.before_training", str(method == "full").lower()]
        launch(output, method, ["--config", "tiny", "--model.path", str(base), *data, *scoring, *options])

    say("6/6", "merge the DoRA adapter into a plain model")
    merge(output / "dora" / "adapter", output / "merged", str(base), "fp32")
    report(output, time.perf_counter() - started)


def launch(output: Path, name: str, arguments: list[str]) -> None:
    """Run the training script under the ``deepspeed`` launcher on two ranks; stop the demo if it fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command = [str(deepspeed), "--num_gpus", str(num_ranks()), "--master_port", str(port), str(TRAIN), *arguments]
    command += ["--run.root", str(output), "--run.name", name]
    print("$ " + " ".join(command[:1] + command[1:]), flush=True)
    log = output / f"{name}.log"
    with log.open("w") as file:
        code = subprocess.run(command, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if code or not (output / name / "metrics.jsonl").is_file():
        print(log.read_text()[-3000:], file=sys.stderr)
        raise ConfigError(f"The run {name} ended with status {code}. Its log is {log}.")


def num_ranks() -> int:
    """Return two, or one where there is one GPU."""
    import torch

    return min(NUM_RANKS, torch.cuda.device_count()) if torch.cuda.is_available() else NUM_RANKS


def report(output: Path, seconds: float) -> None:
    """Print the table of accuracies and write the plots."""
    scores = {"base": metrics(output / "full" / "results" / "before")}
    scores |= {method: metrics(output / method / "results" / "after") for method in METHODS}
    names = [f"llm/{task}" for task in COMMONSENSE] + ["llm/average"]
    chance = {name: scores["base"][name].extra["chance"] for name in names}
    lines = [f"{'accuracy, %':<16}{'chance':>8}" + "".join(f"{method:>16}" for method in scores)]
    for name in names:
        cells = "".join(f"{100 * m[name].value:>10.1f} ± {100 * m[name].stderr:<3.1f}" for m in scores.values())
        lines.append(f"{name.removeprefix('llm/'):<16}{100 * chance[name]:>8.1f}{cells}")
    table = "\n".join(lines)
    print("\n" + table)
    (output / "table.txt").write_text(table + "\n", encoding="utf-8")
    short = {name.removeprefix("llm/"): value for name, value in chance.items()}
    bars = {m: {name.removeprefix("llm/"): v.value for name, v in values.items()} for m, values in scores.items()}
    plot_accuracies(bars, short, output / "accuracy.png")
    plot_losses({method: output / method / "metrics.jsonl" for method in METHODS}, output / "loss.png")
    print(f"\n{seconds:.0f} s. Plots, adapters and the merged model are in {output}.")


def metrics(folder: Path) -> dict[str, Metric]:
    """Return the metrics in a results folder by name."""
    return {metric.name: metric for metric in read_results(folder)}


def say(step: str, text: str) -> None:
    """Announce a step."""
    print(f"\n[{step}] {text}", flush=True)
