"""What the scaling benchmark concludes from its runs."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import scaling


def test_efficiency_is_against_one_gpu_of_the_same_shape_and_stage():
    def row(shape: str, zero: str, count: int, rate: float) -> dict:
        per_gpu = {"tokens_per_s": rate, "tokens_per_s_per_gpu": rate / count}
        return {"shape": shape, "zero": zero, "num_gpus": count, **per_gpu}

    rows = [row("llama", "zero2", 1, 100.0), row("llama", "zero2", 2, 190.0), row("llama", "zero3", 2, 150.0)]
    rows.append({"shape": "llama", "zero": "zero2", "num_gpus": 4, "error": "status 1"})
    done = scaling.with_efficiency(rows)
    assert [line.get("efficiency") for line in done] == [1.0, pytest.approx(0.95), None, None]


def test_losses_are_compared_with_the_first_way(tmp_path):
    for name, losses in (("a", [3.0, 2.0]), ("b", [3.0, 2.5])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, 1)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    known: dict = {}
    assert scaling.compared(tmp_path / "a", "one", known, {})["largest_difference"] == 0
    assert scaling.compared(tmp_path / "b", "two", known, {})["largest_difference"] == 0.5
    assert scaling.compared(tmp_path / "c", "three", known, {"error": "status 1"}) == {
        "way": "three",
        "error": "status 1",
    }


def test_every_row_of_the_picture_runs_has_the_same_conversation(tmp_path):
    file = tmp_path / "rows.json"
    turns = [[{"from": "human", "value": "a" * length}] for length in (3, 1, 2)]
    rows = [{"id": str(n), "image": f"{n}.jpg", "conversations": each} for n, each in enumerate(turns)]
    file.write_text(json.dumps([*rows, {"id": "3", "conversations": turns[0]}]))
    scaling.write_equal_conversations(file)
    equal = json.loads(file.read_text())
    assert [row["conversations"] for row in equal] == [turns[2]] * 4
    assert [row["id"] for row in equal] == ["0", "1", "2", "3"] and {row["image"] for row in equal} == {
        "0.jpg",
        "1.jpg",
        "2.jpg",
    }
