"""``dora nightly`` from the command line, with the launcher's place taken by what writes a finished run's folder."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dora_core.cli import main
from dora_core.evaluation.results import accuracy_metric, write_results
from dora_core.nightly import command, night
from dora_core.training.checkpoint import publish
from dora_core.training.launcher import LaunchResult


def write_run(folder: Path, correct: list[bool], rate: float = 100.0) -> None:
    """Write what a finished run leaves that a night looks at."""
    (folder / "adapter").mkdir(parents=True)
    save_file({"a": np.zeros(4, np.float32)}, folder / "adapter" / "adapter_model.safetensors")
    rows = [{"step": step, "loss": 2.0 / step, "tokens_per_s": rate, "data_wait": 0.01} for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {"commit": "c", "python": "3.11", "versions": {}, "hardware": "cpu", "num_cpus": 2, "world_size": 1}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "config.yaml").write_text("run: {name: a, seed: 0}\ntrain: {lr: 1e-3}\n")
    temporary = folder / "checkpoints" / ".tmp-step-00000008"
    temporary.mkdir(parents=True)
    (temporary / "state.json").write_text(json.dumps({"facts": {"data": "0123456789abcdef, 100 rows"}}))
    publish(temporary, temporary.with_name("step-00000008"))
    predictions = [{"task": "llm/boolq", "instruction": f"q{i}", "correct": each} for i, each in enumerate(correct)]
    write_results(folder / "results" / "after", [accuracy_metric("llm/boolq", correct)], predictions)


class Site:
    """A plan with two entries, and what their launches are to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launched: list[str] = []
        self.correct = [True] * 30 + [False] * 10
        self.behaviour = lambda name: None
        """Returns an exit status other than 0, raises, or returns None for a finished run."""

    def launch(self, words, log, *, time_limit_s, environment):
        name = words[words.index("--run.name") + 1]
        assert words[words.index("--run.resume") + 1] == "auto"
        self.launched.append(name)
        status = self.behaviour(name) or 0
        if not status:
            write_run(Path(words[words.index("--run.root") + 1]) / name, self.correct)
        timed_out = status == -15
        log.write_text("what it printed")
        return LaunchResult(exit_status=status, seconds=2.0, timed_out=timed_out, log=log)

    def night(self, name: str, *more: str) -> int:
        """Run ``dora nightly`` and return its exit status."""
        self.launched.clear()
        arguments = ["nightly", "--output", str(self.folder / name), "--history", str(self.folder / "h.sqlite"), *more]
        try:
            main(arguments)
        except SystemExit as ended:
            return ended.code
        return 0

    def rows(self, name: str) -> dict[tuple[str, str], str]:
        """Return a night's verdicts by entry and metric."""
        lines = (self.folder / name / "results.jsonl").read_text().splitlines()
        return {(row["entry"], row["metric"]): row["verdict"] for row in map(json.loads, lines)}


@pytest.fixture
def site(tmp_path, write_plan, monkeypatch):
    from dora_core.nightly.plan import read_plan

    folder = tmp_path / "pipelines" / "llm"
    write_plan(folder, "".join(["entries:\n", *(f"  - {{name: {n}, recipe: tiny, time_limit_s: 9}}\n" for n in "ab")]))
    site = Site(tmp_path)
    monkeypatch.setattr(command, "find_plan", lambda: read_plan("llm", folder))
    monkeypatch.setattr(night, "launch", site.launch)
    return site


def test_a_green_night_ends_with_0_a_red_one_with_1(site, capsys):
    assert site.night("n1") == 0
    assert site.night("n2") == 0
    site.correct = [False] * 12 + site.correct[12:]
    assert site.night("n3") == 1
    assert site.rows("n3")["a", "llm/boolq:accuracy"] == "red"
    assert "red     llm/a llm/boolq:accuracy" in capsys.readouterr().out
    for name in ("report.html", "report.md", "results.jsonl", "junit.xml", "golden/llm/a.json"):
        assert (site.folder / "n3" / name).stat().st_size > 0


@pytest.mark.parametrize(("status", "reason"), [(1, "ended with status 1"), (-15, "stopped at its time limit of 9 s")])
def test_a_broken_entry_ends_with_3_and_the_others_run(site, status, reason):
    site.behaviour = {"a": status}.get
    assert site.night("n1") == 3
    assert site.launched == ["a", "b"]  # once each: no retries
    assert site.rows("n1")["a", "run"] == "broken" and site.rows("n1")["b", "data"] == "green"
    assert reason in (site.folder / "n1" / "report.md").read_text()
    assert (site.folder / "n1" / "llm" / "a.log").read_text() == "what it printed"


def test_a_run_that_left_no_results_where_there_were_some_is_red(site, monkeypatch):
    assert site.night("n1") == 0
    monkeypatch.setattr(command, "measure_run", lambda folder: without_scores(folder))
    from dora_core.nightly.measure import measure_run

    def without_scores(folder):
        (folder / "results" / "after" / "results.json").unlink(missing_ok=True)
        return measure_run(folder)

    assert site.night("n2") == 1
    assert site.rows("n2")["a", "llm/boolq:accuracy"] == "red"


def test_a_mistake_ends_with_2(site, capsys):
    assert site.night("n1", "--only", "llm/c") == 2
    assert "Unknown entry 'llm/c'" in capsys.readouterr().err
    assert site.night("n1") == 0
    assert site.night("n1") == 2
    assert "holds a finished night" in capsys.readouterr().err


def test_the_nightlys_own_failure_ends_with_3_and_can_go_on(site, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(command, "judge_night", lambda *args: 1 / 0)
        assert site.night("n1") == 3
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert site.night("n1") == 0 and site.launched == []


def test_an_interrupted_night_goes_on_where_it_was(site):
    def stop_at_b(name):
        if name == "b":
            raise KeyboardInterrupt

    site.behaviour = stop_at_b
    assert site.night("n1") == 75
    site.behaviour = lambda name: 75 if name == "b" else None  # ranks that were told to stop, saved
    assert site.night("n1") == 75 and site.launched == ["b"]
    assert site.night("n1", "--only", "llm/b") == 2  # not the night that was begun
    site.behaviour = lambda name: None
    assert site.night("n1") == 0 and site.launched == ["b"]
    assert {entry for entry, _ in site.rows("n1")} == {"a", "b"}


def test_entries_left_out_are_grey(site):
    assert site.night("n1", "--only", "llm/b") == 0
    assert site.launched == ["b"] and site.rows("n1")["a", "run"] == "grey"


def test_two_nights_do_not_share_a_folder(site, capsys):
    first = night.Night(site.folder / "n1", None)
    assert site.night("n1") == 2
    assert "in use by another process. Wait for it, or give another --output" in capsys.readouterr().err
    first.close()
    assert site.night("n1") == 0


def test_a_night_waits_for_what_a_killed_one_left_running(tmp_path):
    lock = (tmp_path / "run.lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    threading.Timer(0.7, lock.close).start()
    started = time.monotonic()
    night._wait_for(tmp_path, 30)
    assert time.monotonic() - started > 0.5
    with (tmp_path / "run.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="in use by another process"):
            night._wait_for(tmp_path, 0.1)


def test_list_and_propose_run_nothing(site, capsys):
    assert site.night("n1", "--list") == 0
    assert "llm/a" in capsys.readouterr().out
    assert site.night("n1", "--propose") == 0
    assert "Nothing to propose" in capsys.readouterr().out
    assert site.launched == [] and not (site.folder / "n1").exists()
