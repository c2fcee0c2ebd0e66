from __future__ import annotations

import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dora_core.evaluation.results import (
    Metric,
    accuracy_metric,
    average_metric,
    commit_hash,
    config_hash,
    dataset_hash,
    format_table,
    mean_metric,
    read_results,
    write_results,
)


def test_the_standard_error_of_an_accuracy_divides_by_n() -> None:
    metric = accuracy_metric("llm/boolq", [True] * 30 + [False] * 10)
    assert (metric.value, metric.n, metric.metric, metric.higher_is_better) == (0.75, 40, "accuracy", True)
    assert metric.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 40), rel=1e-12)
    assert metric.stderr != pytest.approx(math.sqrt(0.75 * 0.25 / 39), rel=1e-3)


def test_an_accuracy_of_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="llm/boolq has 0 predictions"):
        accuracy_metric("llm/boolq", [])


def test_the_standard_error_of_a_mean_is_the_deviation_over_the_root_of_n() -> None:
    metric = mean_metric("vlm/vqav2", "vqa_accuracy", [0.0, 0.3, 0.6, 0.9], extra={"majority": 0.1})
    assert (metric.value, metric.n, metric.metric) == (pytest.approx(0.45), 4, "vqa_accuracy")
    assert metric.stderr == pytest.approx(math.sqrt((0.45**2 + 0.15**2) * 2 / 4) / 2)
    assert metric.extra == {"majority": 0.1}
    with pytest.raises(ValueError, match="vlm/vqav2 has 0 values"):
        mean_metric("vlm/vqav2", "vqa_accuracy", [])


def test_a_mean_of_zeros_and_ones_is_an_accuracy() -> None:
    mean, accuracy = mean_metric("a", "accuracy", [1.0, 1.0, 0.0]), accuracy_metric("a", [True, True, False])
    assert (mean.value, mean.stderr) == pytest.approx((accuracy.value, accuracy.stderr))


def test_an_average_weighs_tasks_equally_whatever_their_size() -> None:
    small = replace(accuracy_metric("a", [True, False]), dataset_hash="one")
    large = replace(accuracy_metric("b", [True] * 9 + [False]), dataset_hash="two")
    mean = average_metric("average", [small, large])
    assert mean.value == pytest.approx(0.7)
    assert mean.stderr == pytest.approx(math.sqrt(0.25 / 2 + 0.09 / 10) / 2)
    assert mean.n == 12
    assert mean.extra["parts"] == ["a", "b"]
    assert mean.dataset_hash != average_metric("average", [large, small]).dataset_hash


@pytest.mark.parametrize("kinds", [[], ["accuracy", "cider"]])
def test_an_average_of_nothing_or_of_different_kinds_is_refused(kinds: list[str]) -> None:
    metrics = [replace(accuracy_metric("a", [True]), metric=kind) for kind in kinds]
    with pytest.raises(ValueError, match="one kind of metric"):
        average_metric("average", metrics)


def test_the_dataset_hash_sees_order_and_content_but_not_the_order_of_keys() -> None:
    rows = [{"question": "é", "answer": "a"}, {"question": "q", "answer": "b"}]
    assert dataset_hash(rows) == dataset_hash([dict(reversed(row.items())) for row in rows])
    assert dataset_hash(rows) != dataset_hash(rows[::-1])
    assert dataset_hash(rows) != dataset_hash(rows[:1])
    assert len(dataset_hash([])) == 64
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1}) != config_hash({"a": 1, "b": 3})


def test_results_come_back_as_they_were_written_and_leave_no_temporary_file(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "evaluation"
    metric = accuracy_metric("llm/boolq", [True, False], extra={"chance": 0.5, "parts": ["é"]})
    write_results(folder, [metric], [{"index": 0, "pred": None}])
    write_results(folder, [metric, replace(metric, stderr=None)], [{"index": 0, "pred": "é"}, {"index": 1}])
    assert read_results(folder) == [metric, replace(metric, stderr=None)]
    assert (folder / "predictions.jsonl").read_text(encoding="utf-8") == '{"index": 0, "pred": "é"}\n{"index": 1}\n'
    assert sorted(file.name for file in folder.iterdir()) == ["predictions.jsonl", "results.json"]


def test_a_failed_write_keeps_the_old_results(tmp_path: Path) -> None:
    metric = accuracy_metric("llm/boolq", [True])
    write_results(tmp_path, [metric], [{"index": 0}])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results(tmp_path, [replace(metric, value=math.nan)], [{"index": 1, "score": math.inf}])
    assert read_results(tmp_path) == [metric]
    assert (tmp_path / "predictions.jsonl").read_text(encoding="utf-8") == '{"index": 0}\n'
    assert len(list(tmp_path.iterdir())) == 2


def test_reading_where_there_are_no_results_or_another_format_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Evaluate first"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"format": 99}', encoding="utf-8")
    with pytest.raises(ValueError, match="format 99"):
        read_results(tmp_path)


def test_the_table_aligns_columns_and_shows_what_is_missing_as_a_dash() -> None:
    metrics = [
        Metric(name="llm/boolq", metric="accuracy", value=0.5, stderr=0.25, n=4, extra={"chance": 0.5}),
        Metric(name="vlm/gqa", metric="accuracy", value=0.123456, stderr=None, n=12),
    ]
    assert format_table(metrics, ("name", "value", "stderr", "n", "chance")).splitlines() == [
        "name        value  stderr   n  chance",
        "llm/boolq  0.5000  0.2500   4  0.5000",
        "vlm/gqa    0.1235       -  12       -",
    ]


def test_the_commit_is_that_of_the_repository_and_says_when_it_is_dirty(tmp_path: Path) -> None:
    assert commit_hash(tmp_path) == "unknown"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert commit_hash(tmp_path) == "unknown"
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert commit_hash(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert commit_hash(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
