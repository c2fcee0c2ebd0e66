"""``dora nightly --propose``: the diff applies, and changes the band and nothing else."""

from __future__ import annotations

import subprocess

import pytest

from dora_core.nightly.plan import read_plan
from dora_core.nightly.propose import propose
from dora_core.yaml_text import edit_yaml, read_yaml

QUIZ = "toy/quiz:accuracy"
HARDWARE = "a processor, 2 CPUs, 1 ranks"
PLAN = """\
# A comment that stays.
entries:
  - name: other  # untouched
    recipe: tiny
    time_limit_s: 60
  - name: tiny
    recipe: tiny
    time_limit_s: 60
    overrides:
      train.lr: 1.0e-3  # as in the paper
    bands:
      tokens_per_s: {relative_floor: 0.5}
      data_wait:
        floor: 0.1
"""


@pytest.fixture
def folder(tmp_path, write_plan):
    """A repository with a plan of the pipeline llm; entries of the nights are of a pipeline ``toy``."""
    folder = tmp_path / "pipelines" / "toy"
    write_plan(folder, PLAN)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return folder


def plan_of(folder):
    """The entries, as of ``toy``, checked against the llm pipeline's recipes."""
    from dataclasses import replace

    return [replace(each, pipeline="toy") for each in read_plan("llm", folder)]


def apply(diff: str, root) -> None:
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=root, check=True)


def test_a_red_and_a_yellow_metric_get_their_value_as_expected(folder, judge, history, measured, measurement, tmp_path):
    tiny = plan_of(folder)[1]
    speed = {"metric": "tokens_per_s", "stderr": 1.0, "evaluation": ""}
    judge(tiny, measured(measurement(outcomes=[1] * 40), measurement(100.0, **speed)))
    rows = judge(tiny, measured(measurement(outcomes=[0] * 15 + [1] * 25), measurement(250.0, **speed)))
    assert (rows[QUIZ].verdict, rows["tokens_per_s"].verdict) == ("red", "yellow")
    before = read_yaml(folder / "nightly.yaml")
    diff = propose(history, plan_of(folder))
    assert (folder / "nightly.yaml").read_text() == PLAN  # nothing moves by itself
    assert diff.startswith("--- a/pipelines/toy/nightly.yaml\n+++ b/pipelines/toy/nightly.yaml\n")
    apply(diff, tmp_path)
    after = read_yaml(folder / "nightly.yaml")
    bands = after["entries"][1]["bands"]
    assert bands.pop(QUIZ) == {"expected": {HARDWARE: 0.625}}
    assert bands["tokens_per_s"].pop("expected") == {HARDWARE: 250.0}
    assert after == before
    kept = (folder / "nightly.yaml").read_text()
    assert "# A comment that stays." in kept and "1.0e-3  # as in the paper" in kept and "# untouched" in kept
    rows = judge(plan_of(folder)[1], measured(measurement(outcomes=[0] * 15 + [1] * 25), measurement(250.0, **speed)))
    assert {row.verdict for row in rows.values() if row.metric != "data_wait"} == {"green"}


def test_changed_data_are_accepted_by_their_hash(folder, judge, history, measured, measurement, tmp_path):
    tiny = plan_of(folder)[1]
    judge(tiny, measured(measurement(outcomes=[1] * 40)))
    cut = measured(measurement(outcomes=[1] * 40, data="0" * 64), data_hash="0" * 64, num_rows=75)
    assert judge(tiny, cut)["data"].verdict == "red"
    before = read_yaml(folder / "nightly.yaml")
    apply(propose(history, plan_of(folder)), tmp_path)
    after = read_yaml(folder / "nightly.yaml")
    assert after["entries"][1].pop("data") == ["0" * 12]
    assert after == before
    assert judge(plan_of(folder)[1], cut)["data"].verdict == "green"


def test_a_green_night_proposes_nothing(folder, judge, history, measured, measurement):
    tiny = plan_of(folder)[1]
    assert propose(history, [tiny]) == ""
    judge(tiny, measured(measurement(outcomes=[1] * 40)))
    assert propose(history, [tiny]) == ""


def test_yaml_is_edited_in_place():
    assert (
        edit_yaml("a:\n  - b: 1  # one\n", [(("a", 0, "c", "d"), 2.5)]) == "a:\n  - b: 1  # one\n    c:\n      d: 2.5\n"
    )
    assert edit_yaml("a: ['x']\n", [(("a",), ["y"])]) == "a:\n  - 'x'\n  - y\n"
