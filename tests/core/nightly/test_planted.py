"""Planted regressions are red and unchanged code is not, through the LLM pipeline's own training and scoring.

Every run is a real one on the tiny world, in a process that is used again: under the launcher each would take 20 s,
most of it imports; ``test_resuming.py`` has nights under the launcher. The clock is planted: each look at it takes 10
ms, so that tokens/s are the same on a busy machine, and a slowdown of 1.5 is exactly that.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dora_core.nightly.command import run_night
from dora_core.nightly.history import History
from dora_core.nightly.night import EntryResult, Night
from dora_core.nightly.plan import read_plan
from dora_core.testing.ranks import run_on_ranks
from pipelines.llm.prepare import prepare

NUM_UNCHANGED = 10
PLAN = """\
entries:
  - name: planted
    recipe: tiny
    time_limit_s: 300
    overrides:
      data.train: [data/world/rows.jsonl]
      data.num_validation: 0
      model.path: data/world/model
      train.max_steps: 12
      train.log_every: 1
      train.lr: {lr}
      train.magnitude_lr: 0.05
      train.save_every: 12
      evaluate.path: data/world
      evaluate.tasks: [boolq, piqa, arc_easy]
      evaluate.limit: 24
      evaluate.mode: rank
      evaluate.batch_size: 72
      evaluate.after_training: true
      deepspeed.config: zero0
"""
LOOK_S = 0.01


class Clock:
    """A clock whose every reading is ``look_s`` later than the last."""

    def __init__(self, look_s: float) -> None:
        self.look_s, self.now = look_s, 0.0

    def perf_counter(self) -> float:
        """Return the time in seconds."""
        self.now += self.look_s
        return self.now


def train_with(world, folder: str, arguments: list[str], fault: str | None) -> None:
    """Train in ``folder`` with a fault in this process; called on a rank."""
    import pipelines.llm.train as loop
    from dora_core.config import load_config, split_arguments
    from dora_core.training import speed
    from pipelines.llm.config import RECIPES, LLMConfig
    from pipelines.llm.evaluators import CommonsenseTask

    os.chdir(folder)
    recipe, overrides = split_arguments(arguments)
    apply, save, rank = loop.apply_adapters, loop.save_adapter, CommonsenseTask._rank

    def without_magnitudes(model, config):
        report = apply(model, config)
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.requires_grad_(False)
        return report

    def save_without_magnitudes(*args):
        from safetensors.torch import load_file, save_file

        [path] = (target := save(*args)).glob("*.safetensors")
        save_file({name: value for name, value in load_file(path).items() if "magnitude" not in name}, path)
        return target

    def lost_answers(self, rows, prompts, context):
        return [{**each, "pred": None} for each in rank(self, rows, prompts, context)]

    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(LOOK_S * (1.5 if fault == "slowdown" else 1))
        patch.setattr(speed, "time", SimpleNamespace(perf_counter=clock.perf_counter))
        if fault == "evaluator":
            patch.setattr(CommonsenseTask, "_rank", lost_answers)
        elif fault == "magnitude_untrained":
            patch.setattr(loop, "apply_adapters", without_magnitudes)
        elif fault == "magnitude_unsaved":
            patch.setattr(loop, "save_adapter", save_without_magnitudes)
        loop.train(load_config(LLMConfig, recipe, overrides, recipes=RECIPES))


class Site:
    """A pipeline's plan, a world and a history, in which nights are run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        prepare(folder / "good" / "data" / "world")
        rows = json.loads((folder / "good" / "data" / "world" / "commonsense_mix.json").read_text())[:400]
        self.write_rows("good", rows)
        shutil.copytree(folder / "good", folder / "cut")
        self.write_rows("cut", rows[:300])
        self.num_nights = 0

    def write_rows(self, name: str, rows: list[dict]) -> None:
        """Write training rows as JSON lines."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / name / "data" / "world" / "rows.jsonl").write_text(text)

    def night(self, fault: str | None = None) -> tuple[int, dict[str, dict]]:
        """Run a night and return its exit status and its results by metric."""
        self.num_nights += 1
        plan = self.folder / "pipelines" / "llm"
        plan.mkdir(parents=True, exist_ok=True)
        lr = "0.05" if fault == "learning_rate" else "0.005"
        (plan / "nightly.yaml").write_text(PLAN.replace("{lr}", lr))
        planned = read_plan("llm", plan)
        where = self.folder / ("cut" if fault == "data" else "good")

        def start(night, one) -> EntryResult:
            run = night.run_folder(one)
            arguments = [*one.arguments(), "--run.root", str(run.parent), "--run.name", run.name]
            arguments += ["--log.tensorboard", "false", "--log.progress", "false"]
            run_on_ranks(train_with, 1, str(where), arguments, fault)
            return EntryResult(problem=None, seconds=1.0, time=f"2026-01-{self.num_nights:02d}T00:00:00")

        output = self.folder / f"night{self.num_nights}"
        status = run_night(Night(output, None), History(self.folder / "h.sqlite"), planned, planned, start)
        lines = (output / "results.jsonl").read_text().splitlines()
        return status, {row["metric"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Two good nights are in the history."""
    site = Site(tmp_path_factory.mktemp("site"))
    site.night()
    return site


def red(rows: dict[str, dict]) -> set[str]:
    return {metric for metric, row in rows.items() if row["verdict"] == "red"}


def test_ten_nights_of_unchanged_code_show_no_red(site):
    for _ in range(NUM_UNCHANGED):
        status, rows = site.night()
        assert status == 0 and {row["verdict"] for row in rows.values()} == {"green"}
    assert rows["loss_distance"]["value"] == 0
    assert len(rows) == 9


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("evaluator", {"llm/boolq:accuracy", "llm/average:accuracy"}),
        ("magnitude_untrained", {"loss_distance"}),
        ("magnitude_unsaved", {"exported_values"}),
        ("learning_rate", {"loss_distance"}),
        ("slowdown", {"tokens_per_s"}),
        ("data", {"data"}),
    ],
)
def test_a_planted_regression_is_red(site, fault, expected):
    status, rows = site.night(fault)
    assert status == 1 and expected <= red(rows), {name: row["reason"] for name, row in rows.items()}
    unharmed = {
        "evaluator": {"loss_distance", "tokens_per_s", "data"},
        "slowdown": {"loss_distance", "exported_values", "llm/boolq:accuracy", "data"},
        "magnitude_unsaved": {"loss_distance", "tokens_per_s", "llm/boolq:accuracy"},
    }.get(fault, set())
    assert not unharmed & red(rows)
    if fault == "learning_rate":
        assert "train.lr: 0.005 -> 0.05" in rows["loss_distance"]["changes"]
    if fault == "data":
        assert "400 rows before, 300 now" in rows["data"]["reason"].replace(" items", "")
        assert {row["verdict"] for name, row in rows.items() if name != "data"} == {"grey"}


def test_after_all_that_the_unchanged_code_is_still_green(site):
    site.night("slowdown")
    status, rows = site.night()
    assert status == 0 and not red(rows)
