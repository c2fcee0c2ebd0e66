"""The table, the numbers and the picture of runs whose scores are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dora_core.config import ConfigError
from dora_core.evaluation.results import accuracy_metric, write_results
from dora_core.registry import PIPELINES
from dora_core.sweep.grid import build_grid
from dora_core.sweep.report import collect, find_metric, write_report

ABOUT = {"pipeline": "llm", "recipe": "tiny"}
RIGHT = {  # of 10 questions, by rank, kind and seed
    (4, "lora"): (3, 5, 4),
    (4, "dora"): (4, 6, 8),
    (8, "lora"): (5, 5, 5),
    (8, "dora"): (6, 7, 8),
}


def leave(folder: Path, right: int, **extra) -> None:
    """Write what a finished run leaves."""
    correct = [place < right for place in range(10)]
    metrics = [accuracy_metric("llm/boolq", correct, extra={"chance": 0.5}), accuracy_metric("llm/average", correct)]
    metrics[1] = replace(metrics[1], extra={"chance": 0.25, "parts": ["llm/boolq"]}, **extra)
    write_results(folder / "results" / "after", metrics, [{"task": "llm/boolq", "correct": each} for each in correct])
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "peak_gib": 2.5}\n{"step": 2, "peak_gib": 2.0}\n')
    (folder / "environment.json").write_text('{"hardware": "some", "versions": {}}')
    (folder / "outcome.json").write_text('{"status": "finished", "seconds": 3.0, "exit_status": 0}')


@pytest.fixture
def grid():
    words = ["--adapter.rank", "4,8", "--run.seed", "0,1,2", "--adapter.kind", "lora,dora"]
    return build_grid(PIPELINES.get("llm"), "tiny", words, Path("out"))


def fill(grid, output: Path, leave_out: tuple[str, ...] = ()) -> None:
    for point in grid.points:
        rank, seed, kind = point.settings.values()
        if point.name not in leave_out:
            leave(output / point.name, RIGHT[rank, kind][seed])


def test_settings_and_paired_differences_are_those_computed_by_hand(grid, tmp_path):
    fill(grid, tmp_path)
    table = write_report(grid, collect(grid, tmp_path, None), tmp_path, ABOUT)
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert document["schema"] == 1 and document["metric"] == "llm/average accuracy"
    first = document["settings"][0]
    assert first["settings"] == {"adapter.rank": 4, "adapter.kind": "lora"}
    assert (first["n"], first["min"], first["max"]) == (3, 0.3, 0.5)
    assert (first["mean"], first["sd"]) == (pytest.approx(0.4), pytest.approx(0.1))
    four, eight = document["differences"]
    assert (four["of"], four["minus"], four["settings"]) == ("dora", "lora", {"adapter.rank": 4})
    # differences 1, 1 and 4 tenths: sd sqrt(3), times t of two degrees over sqrt(3), is t
    assert (four["mean"], four["low"], four["high"]) == tuple(
        pytest.approx(value, abs=1e-5) for value in (0.2, 0.2 - 0.430265, 0.2 + 0.430265)
    )
    assert eight["mean"] == pytest.approx(0.2) and eight["interval"] == "t, over 3 seeds"
    run = document["runs"][0]
    assert (run["name"], run["seconds"], run["peak_gib"]) == ("rank4-seed0-lora", 3.0, 2.5)
    assert run["metrics"][1]["stderr"] == pytest.approx((0.3 * 0.7 / 10) ** 0.5)
    assert run["environment"]["hardware"] == "some"
    assert table == (tmp_path / "table.md").read_text().rstrip("\n")
    assert "| 4            | lora         | 3 | 40.0 | 10.0 | 30.0 | 50.0 |" in table
    assert "| 4            | dora - lora  | 3     | +20.0      | -23.0 to +63.0 | t, over 3 seeds |" in table
    assert "chance 25.0" in table and "over run.seed" in table
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_missing_runs_are_left_out_of_the_pairs_and_named(grid, tmp_path):
    fill(grid, tmp_path, ("rank4-seed2-lora", "rank8-seed0-lora", "rank8-seed1-dora"))
    (tmp_path / "rank4-seed2-lora").mkdir()
    failed = {"status": "failed", "seconds": 1.0, "exit_status": 2}
    (tmp_path / "rank4-seed2-lora" / "outcome.json").write_text(json.dumps(failed))
    table = write_report(grid, collect(grid, tmp_path, None), tmp_path, ABOUT)
    four, eight = json.loads((tmp_path / "sweep.json").read_text())["differences"]
    assert (four["n"], four["interval"]) == (2, "t, over 2 seeds") and four["mean"] == pytest.approx(0.1)
    assert (eight["n"], eight["interval"]) == (1, "normal, over 10 questions; one seed")
    assert (eight["of"], eight["minus"]) == ("dora", "lora")  # as elsewhere, though the first run left is of dora
    assert f"rank4-seed2-lora (failed with status 2, {tmp_path / 'rank4-seed2-lora'}.log)" in table
    assert "rank8-seed0-lora (not begun)" in table and "9 of 12 runs are finished" in table


def test_runs_that_answered_other_questions_are_pointed_out(grid, tmp_path):
    fill(grid, tmp_path)
    leave(tmp_path / "rank4-seed0-lora", 3, dataset_hash="other")
    assert "the runs differ in their questions." in write_report(grid, collect(grid, tmp_path, None), tmp_path, ABOUT)


def test_a_sweep_without_numbers_or_without_scores_has_a_report_too(tmp_path):
    grid = build_grid(PIPELINES.get("llm"), "tiny", ["--adapter.kind", "lora,dora"], tmp_path)
    assert "0 of 2 runs are finished" in write_report(grid, collect(grid, tmp_path, None), tmp_path, ABOUT)
    assert not (tmp_path / "sweep.png").exists()
    for point in grid.points:
        leave(tmp_path / point.name, 5)
    assert "No seed was swept." in write_report(grid, collect(grid, tmp_path, None), tmp_path, ABOUT)
    assert (tmp_path / "sweep.png").stat().st_size > 0


def test_a_metric_is_found_by_name_and_kind(grid, tmp_path):
    fill(grid, tmp_path)
    run = collect(grid, tmp_path, "boolq:accuracy")[0]
    assert run.metric.name == "llm/boolq" and find_metric(run.metrics, "llm/boolq") is run.metric
    with pytest.raises(ConfigError, match=r"--metric is 'boolq:f1'; the results have llm/boolq:accuracy, llm/average"):
        collect(grid, tmp_path, "boolq:f1")
