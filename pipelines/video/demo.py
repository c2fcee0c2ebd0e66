"""The video pipeline's slice of ``make demo``: moving shapes, base, DoRA, scores with and without looking, merge."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from dora_core.evaluation.results import Metric
from dora_core.testing.clip_files import read_lines
from dora_core.testing.clip_texts import KINDS, blind_level, one_frame_level
from dora_core.testing.demo import cell, launch, metrics, say
from dora_core.training.metrics import plot_accuracies, plot_losses
from pipelines.video.evaluate import main as evaluate
from pipelines.video.merge import merge
from pipelines.video.prepare import prepare

QUESTIONS = {
    "video/tvqa": "video/ann/tvqa/tvqa_test_public.jsonl",
    "video/how2qa": "video/ann/how2qa/how2qa_test_public_release.jsonl",
}
CAPTIONS = ("video/tvc", "video/yc2c")
FINE_TUNING = ["--train.max_steps", "800", "--train.eval_every", "800", "--train.save_every", "800"]
FINE_TUNING += ["--train.global_batch_size", "32", "--train.micro_batch_size", "16", "--deepspeed.config", "zero0"]
run = partial(launch, Path(__file__).with_name("train.py"))


def main(arguments: Sequence[str]) -> None:
    """Run the demo in ``--output``; what it leaves there can be looked at, resumed and loaded with PEFT."""
    parser = argparse.ArgumentParser(prog="dora demo video", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/demo/video"))
    output = parser.parse_args(arguments).output
    disable_progress_bar()
    started = time.perf_counter()
    shutil.rmtree(output, ignore_errors=True)
    world = output / "world"
    say("1/5", "film a world of moving shapes: videos, subtitles, the files of four tasks; cache the videos' features")
    prepare(world, num_clips=1200, num_tested=200, num_pictures=0)
    print(f"      {world}")

    say("2/5", "pre-train a random VL-BART on descriptions, and on questions about single frames and speech: the base")
    visual = ["--data.visual.path", str(world / "features")]
    random_model = ["--model.path", str(world / "model"), "--data.path", str(world / "pretraining")]
    run(output, "base", ["--config", "tiny_base", *random_model, *visual])

    say("3/5", "fine-tune with DoRA on all questions, those about motion too; score on clips never shown")
    base = ["--config", "tiny", "--model.path", str(output / "base" / "model"), "--data.path", str(world), *visual]
    run(output, "dora", [*base, *FINE_TUNING, "--evaluate.after_training", "true"])

    say("4/5", "score again on one frame of each clip and on other clips' frames, and the base model")
    adapter = ["--adapter", str(output / "dora" / "adapter")]
    for look in ("one_frame", "shuffled"):
        evaluate([*base, *adapter, "--evaluate.look", look, "--output", str(output / look)])
    evaluate([*base, "--output", str(output / "base_results")])

    say("5/5", "merge the DoRA adapter into a plain VL-BART")
    merge(output / "dora" / "adapter", output / "merged", str(output / "base" / "model"))
    report(output, time.perf_counter() - started)


def report(output: Path, seconds: float) -> None:
    """Print the table of scores and write the plots."""
    folders = ("base_results", "shuffled", "one_frame", "dora/results/after")
    found = {folder: metrics(output / folder) for folder in folders}
    titles = ("no look", "one frame", "base", "shuffled", "1 frame seen", "dora")
    lines = [f"{'score, %':<18}{'n':>5}" + "".join(f"{title:>14}" for title in titles)]
    known = {name: read_lines(output / "world" / file) for name, file in QUESTIONS.items()}
    levels: dict[str, float] = {}
    for kind in KINDS:
        rows = [row for listed in known.values() for row in listed if row["show_name"] == kind]
        values = [_by_kind(found[folder], kind) for folder in folders]
        levels[kind] = one_frame_level(rows)
        shown = [blind_level(rows), levels[kind], *values]
        lines.append(f"{kind + ' questions':<18}{len(rows):>5}" + "".join(f"{100 * value:>14.1f}" for value in shown))
    for name in (*QUESTIONS, *CAPTIONS):
        right = found[folders[-1]][name]
        cells = f"{100 * right.extra['majority']:>14.1f}{'':>14}"
        cells += "".join(f"{cell(found[folder][name]):>14}" for folder in folders)
        lines.append(f"{name.removeprefix('video/') + ' ' + right.metric:<18}{right.n:>5}{cells}")
    table = "\n".join(lines)
    print("\n" + table)
    (output / "table.txt").write_text(table + "\n", encoding="utf-8")
    labels = {"base": folders[0], "one frame seen": folders[2], "DoRA": folders[3]}
    bars = {label: {kind: _by_kind(found[folder], kind) for kind in KINDS} for label, folder in labels.items()}
    plot_accuracies(bars, levels, output / "accuracy.png", "best answer from one frame")
    plot_losses({name: output / name / "metrics.jsonl" for name in ("base", "dora")}, output / "loss.png")
    print(f"\n{seconds:.0f} s. Plots, the adapter and the merged model are in {output}.")


def _by_kind(found: dict[str, Metric], kind: str) -> float:
    """Return the share of right answers to both tasks' questions of a kind."""
    parts: list[Any] = [found[name].extra["by_kind"][kind] for name in QUESTIONS]
    return sum(value * n for value, n in parts) / sum(n for _, n in parts)
