"""The VLM pipeline's slice of ``make demo``: pictures, base, DoRA, scores with right and shuffled pictures, merge."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from dora_core.evaluation.evaluator import Evaluator
from dora_core.evaluation.results import PREDICTIONS_FILE
from dora_core.registry import EVALUATORS
from dora_core.testing.demo import cell, launch, metrics, say
from dora_core.training.metrics import plot_accuracies, plot_losses
from pipelines.vlm.config import BENCHMARKS
from pipelines.vlm.evaluate import main as evaluate
from pipelines.vlm.merge import merge
from pipelines.vlm.prepare import prepare

FINE_TUNING = ["--train.max_steps", "450", "--train.eval_every", "450", "--train.save_every", "450"]
run = partial(launch, Path(__file__).with_name("train.py"))


def main(arguments: Sequence[str]) -> None:
    """Run the demo in ``--output``; what it leaves there can be looked at, resumed and loaded with PEFT."""
    parser = argparse.ArgumentParser(prog="dora demo vlm", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/demo/vlm"))
    output = parser.parse_args(arguments).output
    disable_progress_bar()
    started = time.perf_counter()
    shutil.rmtree(output, ignore_errors=True)
    world = output / "world"
    say("1/5", "draw a world of small pictures, with captions, conversations and the files of seven benchmarks")
    prepare(world)
    print(f"      {world}")

    say("2/5", "pre-train a random LLaVA, tower, projector and language model, on the captions: the base model")
    images = ["--data.images", str(world / "images")]
    random_model = ["--model.path", str(world / "model"), "--data.train", f"[{world / 'captions.json'}]", *images]
    run(output, "base", ["--config", "tiny_base", *random_model])

    say("3/5", "freeze the tower; instruction tuning with DoRA and the projector; score on pictures never shown")
    base = ["--config", "tiny", "--model.path", str(output / "base" / "model"), "--evaluate.path", str(world / "eval")]
    tuning = [*base, "--data.train", f"[{world / 'instructions.json'}]", *images, *FINE_TUNING]
    run(output, "dora", [*tuning, "--evaluate.after_training", "true"])

    say("4/5", "score again with every question under another question's picture, and the base model with its own")
    scored = [*base, "--data.train", f"[{world / 'instructions.json'}]"]
    adapter = ["--adapter", str(output / "dora" / "adapter")]
    shuffled = ["--evaluate.shuffle_images", "true", "--output", str(output / "shuffled")]
    evaluate([*scored, *adapter, *shuffled])
    evaluate([*scored, "--output", str(output / "base_results")])

    say("5/5", "merge the DoRA adapter into a plain LLaVA")
    merge(output / "dora" / "adapter", output / "merged", precision="fp32")
    report(output, time.perf_counter() - started)


def report(output: Path, seconds: float) -> None:
    """Print the table of scores and write the plots."""
    results = output / "dora" / "results" / "after"
    right = metrics(results)
    others = {"shuffled": metrics(output / "shuffled"), "base": metrics(output / "base_results")}
    blind = blind_levels(results)
    lines = [f"{'score, %':<12}{'metric':<20}{'without looking':>16}{'base':>14}{'shuffled':>14}{'dora':>14}"]
    for name in [f"vlm/{task}" for task in BENCHMARKS] + ["vlm/average"]:
        cells = "".join(f"{cell(m[name]):>14}" for m in (others["base"], others["shuffled"], right))
        short = name.removeprefix("vlm/")
        lines.append(f"{short:<12}{right[name].metric:<20}{100 * blind[name]:>16.1f}{cells}")
    table = "\n".join(lines)
    print("\n" + table)
    (output / "table.txt").write_text(table + "\n", encoding="utf-8")
    bars = {
        label: {name.removeprefix("vlm/"): each[name].value for name in blind}
        for label, each in {"shuffled pictures": others["shuffled"], "DoRA": right}.items()
    }
    levels = {name.removeprefix("vlm/"): level for name, level in blind.items()}
    plot_accuracies(bars, levels, output / "accuracy.png", "without looking")
    plot_losses({name: output / name / "metrics.jsonl" for name in ("base", "dora")}, output / "loss.png")
    print(f"\n{seconds:.0f} s. Plots, the adapter with its projector and the merged model are in {output}.")


def blind_levels(results: Path) -> dict[str, float]:
    """Return by benchmark what the best answers score that are given without looking, and their mean.

    For each wording of a question the answer that fits most of its pictures, or one answer for all questions, whichever
    scores more. Both know the test's answers; a model that does not look can only come close to them.
    """
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in (results / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["task"]].append(row)
    known = metrics(results)
    levels = {
        name: max(known[name].extra["majority"], _by_wording(EVALUATORS.get(name), own)) for name, own in rows.items()
    }
    return levels | {"vlm/average": sum(levels.values()) / len(levels)}


def _by_wording(evaluator: Evaluator, rows: list[dict[str, Any]]) -> float:
    candidates = sorted({row["text"] for row in rows})
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["prompt"].partition("\n")[0]].append(row)
    answered = []
    for group in groups.values():
        tried = [[{**row, **evaluator.judge(row, text)} for row in group] for text in candidates]
        answered += max(tried, key=lambda judged: sum(float(row.get("score", row.get("correct"))) for row in judged))
    return evaluator.score(sorted(answered, key=lambda row: row["index"]))[0].value
