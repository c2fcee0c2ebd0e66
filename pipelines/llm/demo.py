"""The LLM pipeline's slice of ``make demo``: world, base, three ways of fine-tuning, scores, merge, table and plots."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from transformers.utils.logging import disable_progress_bar

from dora_core.config import ConfigError
from dora_core.engine.distributed import free_port
from dora_core.evaluation.results import Metric, read_results
from dora_core.training.metrics import plot_accuracies, plot_losses, read_metrics
from pipelines.llm.config import COMMONSENSE
from pipelines.llm.merge import merge
from pipelines.llm.prepare import prepare

NUM_RANKS = 2
FINE_TUNING = [
    *("--train.max_steps", "650", "--train.schedule", "cosine", "--train.warmup_steps", "20"),
    *("--train.global_batch_size", "32", "--train.micro_batch_size", "16"),
    *("--train.eval_every", "100", "--train.save_every", "650"),
]
METHODS = {
    "full": ("full fine-tuning", ["--adapter.kind", "full", "--adapter.targets", ".*", "--train.lr", "5e-4"]),
    "lora": ("LoRA", ["--adapter.kind", "lora"]),
    "dora": ("DoRA", ["--adapter.kind", "dora"]),
}
TRAIN = Path(__file__).with_name("train.py")
PROGRESS = re.compile(r"\d+%\|.*\d+/\d+ ")


def main(arguments: Sequence[str]) -> None:
    """Run the demo in ``--output``; what it leaves there can be looked at, resumed and loaded with PEFT."""
    parser = argparse.ArgumentParser(prog="dora demo llm", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/demo/llm"))
    output = parser.parse_args(arguments).output
    disable_progress_bar()  # those of saving a model of two megabytes
    started = time.perf_counter()
    shutil.rmtree(output, ignore_errors=True)
    world = output / "world"
    say("1/6", "make up a small world with questions in eight formats, a random LLaMA and its tokenizer")
    prepare(world)
    print(f"      {world}")

    say("2/6", "pre-train the LLaMA on plain statements of the world's facts: the base model")
    random_model = ["--model.path", str(world / "model"), "--data.train", f"[{world / 'statements.json'}]"]
    launch(output, "base", ["--config", "tiny_base", *random_model])

    base = ["--config", "tiny", "--model.path", str(output / "base" / "model")]
    base += ["--data.train", f"[{world / 'commonsense_mix.json'}]", "--evaluate.path", str(world)]
    for place, (method, (title, options)) in enumerate(METHODS.items(), 3):
        say(f"{place}/6", f"fine-tune the base on the eight formats with {title}; score it on facts held out of them")
        scoring = ["--evaluate.after_training", "true"]
        scoring += ["--evaluate.before_training", "true"] if method == "full" else []
        launch(output, method, [*base, *FINE_TUNING, *scoring, *options])

    say("6/6", "merge the DoRA adapter into a plain model")
    merge(output / "dora" / "adapter", output / "merged", str(output / "base" / "model"), "fp32")
    report(output, time.perf_counter() - started)


def launch(output: Path, name: str, arguments: list[str]) -> None:
    """Run the training script under the ``deepspeed`` launcher; its output goes to a log, its progress bar here too.

    Stops the demo if the run fails.
    """
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command = [
        str(deepspeed),
        "--num_gpus",
        str(num_ranks()),
        "--master_port",
        str(free_port()),
        str(TRAIN),
        *arguments,
    ]
    command += ["--run.root", str(output), "--run.name", name]
    shown = shlex.join(["deepspeed", *command[1:5], os.path.relpath(TRAIN)])
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
        average = metrics(folder / "results" / "after")["llm/average"]
        text += f", accuracy {100 * average.value:.1f} % (chance {100 * average.extra['chance']:.1f} %)"
    return f"{text}, {seconds:.0f} s"


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
    unread = {method: m["llm/average"].extra["num_unparsed"] for method, m in scores.items()}
    table += "\nanswers that name no option: " + ", ".join(f"{method} {count}" for method, count in unread.items())
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
