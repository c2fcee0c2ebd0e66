"""A run's folder to numbers: scores with their examples, speed, the curve's distance, what the export holds."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from dora_core.evaluation.results import Metric, accuracy_metric, mean_metric, write_results
from dora_core.nightly.measure import (
    MeasurementError,
    compared_settings,
    curve_distance,
    measure_export,
    measure_run,
    measure_scores,
    measure_speed,
)


def test_the_distance_of_two_curves_is_the_relative_difference_of_their_losses():
    golden = [(1, 4.0), (2, 2.0), (3, 1.0)]
    assert curve_distance(golden, golden) == 0
    assert curve_distance([(step, 1.1 * loss) for step, loss in golden], golden) == pytest.approx(math.log(1.1))
    assert curve_distance([(2, 2.0 * math.e), (3, 1.0), (9, 5.0)], golden) == pytest.approx(math.sqrt(1 / 2))
    assert curve_distance([(7, 1.0)], golden) is None
    assert curve_distance([(1, math.nan)], golden) == math.inf


def test_examples_are_kept_where_the_score_is_their_mean(tmp_path):
    rows = [
        {
            "task": "toy/quiz",
            "instruction": f"q{i}",
            "answer": "yes",
            "pred": "no",
            "correct": i % 3 == 0,
            "score": i / 9,
        }
        for i in range(9)
    ]
    f1 = Metric(name="toy/quiz", metric="f1", value=0.4, stderr=None, n=9)
    metrics = [
        accuracy_metric("toy/quiz", [row["correct"] for row in rows]),
        mean_metric("toy/quiz", "partial", [row["score"] for row in rows]),
        f1,
    ]
    write_results(tmp_path, metrics, [*rows, {"task": "toy/other", "correct": True}])
    accuracy, partial, other = measure_scores(tmp_path, "data")
    assert [each.value for each in accuracy.outcomes] == [1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert (accuracy.outcomes[1].question, accuracy.outcomes[1].right, accuracy.outcomes[1].given) == (
        "q1",
        "yes",
        "no",
    )
    assert [each.value for each in partial.outcomes] == [row["score"] for row in rows]
    assert other.outcomes == [] and other.metric == "toy/quiz:f1" and accuracy.data_hash == "data+"


def test_a_run_that_did_not_score_has_no_scores(tmp_path):
    assert measure_scores(tmp_path / "results", "data") == []


def test_speed_is_the_median_after_the_first_row():
    rows = [
        {"tokens_per_s": rate, "data_wait": 0.1, "peak_gib": peak} for rate, peak in ((1, 2.0), (90, 3.0), (110, 2.5))
    ]
    speed, wait, peak = measure_speed(rows, "data")
    assert (speed.metric, speed.value, speed.higher_is_better) == ("tokens_per_s", 100, True)
    assert speed.stderr == pytest.approx(1.2533 * 1.4826 * 10 / math.sqrt(2))
    assert (wait.metric, wait.value, wait.stderr, wait.higher_is_better) == ("data_wait", 0.1, 0.0, False)
    assert (peak.metric, peak.value) == ("peak_gib", 3.0)
    del rows[0]["peak_gib"], rows[1]["peak_gib"], rows[2]["peak_gib"]
    assert [each.metric for each in measure_speed(rows, "data")] == ["tokens_per_s", "data_wait"]


def test_the_export_counts_every_number(tmp_path):
    (tmp_path / "adapter").mkdir()
    save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float16)}, tmp_path / "adapter" / "x.safetensors")
    assert measure_export(tmp_path, "data").value == 17
    with pytest.raises(MeasurementError, match="neither adapter nor model"):
        measure_export(tmp_path / "adapter", "data")


def test_settings_that_say_where_a_run_lies_are_not_compared():
    config = {
        "run": {"name": "a", "root": "b", "resume": "auto", "seed": 3},
        "log": {"progress": True},
        "train": {"lr": 1},
    }
    assert compared_settings(config) == {"run": {"seed": 3}, "train": {"lr": 1}}


def test_an_unfinished_run_is_not_measured(tmp_path):
    with pytest.raises(MeasurementError, match=r"has no metrics.jsonl; a finished run must leave it"):
        measure_run(tmp_path)
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "environment.json").write_text(json.dumps({}))
    with pytest.raises(MeasurementError, match="no checkpoint that verifies"):
        measure_run(tmp_path)
