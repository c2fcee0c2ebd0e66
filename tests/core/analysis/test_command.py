"""``dora analyze`` on real files: a run's checkpoints, adapters, models; what it writes and what it refuses."""

import csv
import json
import shutil
import subprocess
import sys

import pytest

from dora_core.adapters import AdapterConfig, apply_adapters, save_adapter
from dora_core.analysis.decomposition import Change
from dora_core.analysis.points import Point, correlations, states
from dora_core.cli import main as dora
from dora_core.testing.tiny import tiny_llama

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps with a checkpoint at each, and its base model."""
    folder = tmp_path_factory.mktemp("analysis")
    dora(["prepare", "llm", str(folder / "world")])
    options = {
        "model.path": folder / "world" / "model", "data.train": f"[{folder / 'world' / 'commonsense_mix.json'}]",
        "data.num_validation": 0, "train.max_steps": 4, "train.save_every": 1, "train.keep_last": 4,
        "train.eval_every": 4, "run.root": folder, "run.name": "dora",
    }  # fmt: skip
    train(*(str(word) for key, value in options.items() for word in (f"--{key}", value)))
    return folder


def train(*options: str) -> None:
    """In a process of its own, as DeepSpeed wants it."""
    command = [sys.executable, "-m", "dora_core.cli", "train", "llm", "--config", "tiny", "--log.tensorboard", "false"]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)


def test_a_run_is_the_series_of_its_checkpoints(run, tmp_path, capsys):
    base = str(run / "world" / "model")
    adapter = run / "dora" / "adapter"
    dora(["analyze", base, str(run / "dora"), f"exported={adapter}", "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "dora q_proj" in shown and "exported down_proj" in shown
    with (tmp_path / "changes.csv").open() as file:
        rows = list(csv.DictReader(file))
    own = [row for row in rows if row["method"] == "dora"]
    assert sorted({row["step"] for row in own}) == ["1", "2", "3", "4"] and len(own) == 4 * len(rows) / 5
    by_step = [sum(float(r["delta_d"]) for r in own if r["step"] == str(step)) for step in (1, 2, 3, 4)]
    assert by_step == sorted(by_step) and by_step[0] > 0
    last = {row["name"]: row for row in own if row["step"] == "4"}
    for row in rows:
        if row["method"] == "exported":
            assert float(row["delta_m"]) == pytest.approx(float(last[row["name"]]["delta_m"]), rel=1e-5)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["after"]) == 5 and {c["method"] for c in summary["correlations"]} == {"dora", "exported"}
    assert len(summary["correlations_within_steps"]) == len(summary["correlations"]) == 10
    for name in ("scatter", "layers", "steps"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)


def point(run: str, step: int, layer: int, delta_d: float, delta_m: float) -> Point:
    change = Change(f"layers.{layer}.q_proj.weight", layer, "q_proj", 2, 2, delta_m, delta_d, 1.0)
    return Point("dora", run, step, change)


def test_growth_over_steps_alone_is_no_correlation_within_steps():
    opposite = [point(run, step, layer, step + layer / 10, step - layer / 10)
                for run in "ab" for step in (1, 2, 3) for layer in range(4)]  # fmt: skip
    (over_all,) = correlations(opposite).values()
    (within,) = correlations(opposite, within_steps=True).values()
    assert over_all.r > 0.95 and within.r == pytest.approx(-1)
    assert over_all.num_points == 24 and over_all.num_groups == 8  # layers of each run


def test_a_run_that_trains_everything(run, tmp_path, capsys):
    base = run / "world" / "model"
    options = ["--adapter.kind", "full", "--adapter.targets", ".*", "--train.max_steps", "1", "--train.save_every", "1"]
    options += ["--model.path", str(base), "--data.train", f"[{run / 'world' / 'commonsense_mix.json'}]"]
    options += ["--run.root", str(tmp_path), "--run.name", "full", "--data.num_validation", "0"]
    train(*options)
    dora(["analyze", str(base), str(tmp_path / "full"), "--weights", "q_proj|gate", "--output", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "full gate_proj" in shown and "full k_proj" not in shown


def test_what_an_argument_means(run, tmp_path):
    checkpoint = run / "dora" / "checkpoints" / "step-00000002"
    assert [(s.method, s.run, s.step) for s in states(str(checkpoint))] == [("dora", str(run / "dora"), 2)]
    assert [(s.method, s.step) for s in states(f"x={run / 'dora' / 'adapter'}")] == [("x", None)]
    assert [(s.method, s.step) for s in states(str(run / "dora" / "adapter"))] == [("dora", None)]
    shutil.copytree(run / "dora", tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoints"))
    assert [s.path for s in states(str(tmp_path / "bare"))] == [str(tmp_path / "bare" / "adapter")]
    assert states("some/model")[0].method == "model"


def test_mistakes_end_in_one_message(run, tmp_path, capsys):
    base = str(run / "world" / "model")
    wrong = tiny_llama(300, hidden=32, layers=1, heads=2, intermediate=48)
    apply_adapters(wrong, AdapterConfig(rank=2, targets=["q_proj"]))
    save_adapter(wrong, AdapterConfig(rank=2, targets=["q_proj"]), tmp_path / "wrong")
    (tmp_path / "nothing").mkdir()
    for arguments, expected in (
        ([base, str(tmp_path / "nothing")], "no state of a model"),
        ([str(run / "dora"), base], "it must be one state"),
        ([base, base, "--weights", "zzz"], "no matrix matches"),
        ([base, str(tmp_path / "wrong")], "what was trained is for [32, 32]"),
    ):
        with pytest.raises(SystemExit) as stopped:
            dora(["analyze", *arguments, "--output", str(tmp_path / "out")])
        assert stopped.value.code == 2 and expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
