"""Nights under the real launcher, with the LLM pipeline: killed and gone on with, green, red and broken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dora_core.training.checkpoint import CheckpointStore
from pipelines.llm.prepare import prepare

CHECKOUT = Path(__file__).parents[3]
PLAN = """\
entries:
  - name: small
    recipe: tiny
    time_limit_s: 300
    overrides:
      data.num_validation: 0
      train.max_steps: 60
      train.save_every: 10
      evaluate.tasks: [boolq, piqa]
      evaluate.mode: rank
      evaluate.after_training: true
      deepspeed.config: zero0
    bands:
      tokens_per_s: {relative_floor: 100, k: 100}  # not watched: other tests share the processors
      data_wait: {floor: 1}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A copy of the pipeline with a plan of its own, beside a world."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "pipelines").mkdir()
    (folder / "pipelines" / "__init__.py").touch()
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "pipelines" / "llm", folder / "pipelines" / "llm", ignore=ignore)
    (folder / "pipelines" / "llm" / "nightly.yaml").write_text(PLAN)
    prepare(folder / "data" / "world")
    return folder


def start(site: Path, night: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "dora_core.cli", "nightly", "--history", "h.sqlite", "--output", night]
    path = os.pathsep.join([str(site), str(CHECKOUT / "packages")])
    return subprocess.Popen(command, cwd=site, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def results(site: Path, night: str) -> dict[str, dict]:
    lines = (site / night / "results.jsonl").read_text().splitlines()
    return {row["metric"]: row for row in map(json.loads, lines)}


def test_a_killed_night_goes_on_from_its_checkpoint(site):
    process = start(site, "n1")
    store = CheckpointStore(site / "n1" / "llm" / "runs" / "small" / "checkpoints")
    deadline = time.monotonic() + 180
    while not store.steps():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    launchers = children(process.pid)  # as if the machine died: nobody is told, nothing goes on
    process.send_signal(signal.SIGKILL)
    for launcher in launchers:
        os.killpg(launcher, signal.SIGKILL)
    process.wait()
    name = json.loads((site / "n1" / "night.json").read_text())["night"]
    assert not (site / "n1" / "results.jsonl").exists()
    assert start(site, "n1").wait(240) == 0
    log = (site / "n1" / "llm" / "small.log").read_text()
    assert "resumed from" in log
    rows = results(site, "n1")
    assert {row["night"] for row in rows.values()} == {name}
    assert rows["exported_values"]["value"] == 45696 and rows["llm/boolq:accuracy"]["n"] == 40
    with sqlite3.connect(site / "h.sqlite") as database:
        assert database.execute("SELECT night, verdict FROM runs").fetchall() == [(name, "green")]


def test_a_broken_evaluator_ends_with_1_and_a_crash_with_3(site):
    evaluators = site / "pipelines" / "llm" / "evaluators.py"
    whole = evaluators.read_text()
    assert 'answer["pred"] == row["answer"]' in whole
    evaluators.write_text(whole.replace('answer["pred"] == row["answer"]', "False"))
    assert start(site, "n2").wait(240) == 1
    rows = results(site, "n2")
    assert {rows[f"llm/{task}:accuracy"]["verdict"] for task in ("boolq", "piqa", "average")} == {"red"}
    assert rows["loss_distance"]["value"] == 0 and rows["loss_distance"]["verdict"] == "green"
    (site / "pipelines" / "llm" / "train.py").write_text("raise SystemExit(9)\n")
    assert start(site, "n3").wait(240) == 3
    assert results(site, "n3")["run"]["verdict"] == "broken"
