"""The LLM pipeline's slice of ``make demo``: world, base, three ways of fine-tuning, scores, merge, table and plots."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from dora_core.testing.demo import launch, metrics, say
from dora_core.training.metrics import plot_accuracies, plot_losses
from pipelines.llm.config import COMMONSENSE
from pipelines.llm.merge import merge
from pipelines.llm.prepare import prepare

FINE_TUNING = [
    *("--train.max_steps", "480", "--train.schedule", "cosine", "--train.warmup_steps", "20"),
    *("--train.betas", "[0.9, 0.98]"),
    *("--train.global_batch_size", "32", "--train.micro_batch_size", "16"),
    *("--train.eval_every", "100", "--train.save_every", "480"),
]
METHODS = {
    "full": ("full fine-tuning", ["--adapter.kind", "full", "--adapter.targets", ".*", "--train.lr", "5e-4"]),
    "lora": ("LoRA", ["--adapter.kind", "lora"]),
    "dora": ("DoRA", ["--adapter.kind", "dora"]),
}
run = partial(launch, Path(__file__).with_name("train.py"))


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
    run(output, "base", ["--config", "tiny_base", *random_model])

    base = ["--config", "tiny", "--model.path", str(output / "base" / "model")]
    base += ["--data.train", f"[{world / 'commonsense_mix.json'}]", "--evaluate.path", str(world)]
    for place, (method, (title, options)) in enumerate(METHODS.items(), 3):
        say(f"{place}/6", f"fine-tune the base on the eight formats with {title}; score it on facts held out of them")
        scoring = ["--evaluate.after_training", "true"]
        scoring += ["--evaluate.before_training", "true"] if method == "full" else []
        run(output, method, [*base, *FINE_TUNING, *scoring, *options])

    say("6/6", "merge the DoRA adapter into a plain model")
    merge(output / "dora" / "adapter", output / "merged", str(output / "base" / "model"), "fp32")
    report(output, time.perf_counter() - started)


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
