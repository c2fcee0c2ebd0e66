"""The weight-decomposition study: all of it on a tiny model for a few steps, and its table from known numbers."""

import argparse
import json
import shutil

import pytest

from dora_core.analysis.correlation import Correlation
from dora_core.cli import main as dora
from pipelines.llm.study import write_report


def test_the_study_trains_analyzes_reports_and_does_nothing_twice(tmp_path, capsys):
    command = [
        "analyze",
        "--study",
        "llm",
        "--output",
        str(tmp_path),
        "--seeds",
        "5",
        "--steps",
        "4",
        "--base-steps",
        "4",
    ]
    command += [
        "--hidden",
        "32",
        "--layers",
        "2",
        "--heads",
        "2",
        "--jobs",
        "2",
        "--adapter-lr",
        "4e-3",
        "--overrides",
        "--data.num_validation",
        "0",
    ]
    command += ["--evaluate.tasks", "[openbookqa]", "--train.global_batch_size", "4", "--train.micro_batch_size", "2"]
    dora(command)
    assert "| DoRA |" in capsys.readouterr().out
    for method, lr in (("full", 5e-4), ("lora", 4e-3), ("dora", 4e-3)):
        assert f"lr: {lr}" in (tmp_path / f"{method}-5" / "config.yaml").read_text()
        assert len([*(tmp_path / f"{method}-5" / "checkpoints").glob("step-*")]) == 4
    content = json.loads((tmp_path / "study.json").read_text())
    assert [each["method"] for each in content["methods"]] == ["full", "lora", "dora"]
    assert content["methods"][2]["correlations"]["q_proj"]["all"]["num_points"] == 8  # two layers at four steps
    assert (tmp_path / "analysis" / "scatter.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    checkpoints = tmp_path / "dora-5" / "checkpoints"
    shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-00000009")  # as where a run was stopped
    dora(command)
    assert json.loads((tmp_path / "study.json").read_text())["methods"] == content["methods"]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}


def test_the_table_says_what_was_found_beside_the_paper(tmp_path):
    accuracies = {"full": [0.5, 0.6, 0.7], "lora": [0.5, 0.5, 0.5], "dora": [0.6, 0.7, 0.8]}
    found = {(method, "q_proj"): Correlation(r, r - 0.1, r + 0.1, 48, 12) for method, r in
             (("full", -0.5), ("lora", 0.5), ("dora", 0.25))}  # fmt: skip
    table = write_report(argparse.Namespace(output=tmp_path, seeds="0,1,2"), accuracies, found, found, 1.0)
    assert "| full fine-tuning | 60.0 (10.0) | +10.0 [-14.8, +34.8] | -0.50 [-0.60, -0.40] |" in table
    assert "| LoRA | 50.0 (0.0) | - | +0.50" in table and table.splitlines()[-1].endswith("| -0.31 |")
    assert (tmp_path / "study.md").read_text() == table + "\n"


def test_mistakes(tmp_path):
    for arguments in (["--steps", "5"], ["--steps", "0"], ["--seeds", "a"], ["--jobs", "0"]):
        with pytest.raises(SystemExit):
            dora(["analyze", "--study", "llm", "--output", str(tmp_path / "x"), *arguments])
    assert not (tmp_path / "x").exists()
    with pytest.raises(SystemExit):
        dora(["analyze", "--study", "vlm"])
