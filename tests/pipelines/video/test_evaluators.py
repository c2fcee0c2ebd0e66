"""What the eight evaluators share: rows from a task's annotations, predictions and files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dora_core.data.rows import DataError
from dora_core.evaluation.evaluator import EvaluationContext, FileWriter
from dora_core.evaluation.results import read_results
from dora_core.evaluation.runner import run_evaluators
from dora_core.registry import EVALUATORS
from pipelines.video import evaluators
from pipelines.video.evaluators.examples import best_constant
from pipelines.video.task import Example

ROOT = Path(__file__).resolve().parents[3]
TASKS = {
    "vqa": "vqa",
    "gqa": "gqa",
    "nlvr2": "nlvr2",
    "coco_caption": "caption",
    "tvqa": "tvqa",
    "how2qa": "how2qa",
    "tvc": "tvc",
    "yc2c": "yc2c",
}
SUBTITLES = [{"vid_name": "clip1", "sub": [{"text": "hello", "start": 0, "end": 1}, {"text": "you"}]}]


def get(name: str) -> Any:
    assert evaluators  # imported: it registers them
    return EVALUATORS.get(f"video/{name}")


def settings(root: Path, **changes: Any) -> SimpleNamespace:
    given = {"split": "test", "limit": None, "num_beams": 5, "max_new_tokens": None, "reference_decoding": False}
    return SimpleNamespace(path=str(root), **{**given, **changes})


def context_of(section: SimpleNamespace) -> EvaluationContext:
    return EvaluationContext(model=None, tokenizer=None, section=section)


def write(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))


def gqa_record(number: int, answer: str | None = "yes") -> dict[str, Any]:
    record = {"question_id": f"q{number}", "img_id": f"n{number}", "sent": f"Is it {number}?"}
    return record if answer is None else {**record, "label": {answer: 1.0}}


def tvqa_record(number: int, **changes: Any) -> dict[str, Any]:
    choices = {f"a{place}": f"choice {place}" for place in range(5)}
    return {"qid": number, "q": "Why?", "ts": "1.0-2.5", "vid_name": "clip1", **choices, "answer_idx": 2, **changes}


def write_tvqa(root: Path, records: Sequence[dict[str, Any]]) -> None:
    write(root / "video/ann/tvqa/tvqa_test_public.jsonl", records)
    write(root / "video/ann/tv_subtitles.jsonl", SUBTITLES)


def answering(monkeypatch: pytest.MonkeyPatch, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Let the model write ``texts``; return the list to which each call is added."""
    calls: list[dict[str, Any]] = []

    def generate_targets(examples: list[Example], task: Any, context: Any, **options: Any) -> list[str]:
        calls.append({"examples": examples, "task": task.name, **options})
        return list(texts)[: len(examples)]

    module = ModuleType("pipelines.video.answering")
    module.generate_targets = generate_targets
    monkeypatch.setitem(sys.modules, "pipelines.video.answering", module)
    return calls


def test_importing_the_evaluators_imports_nothing_that_is_slow() -> None:
    slow = {"torch", "transformers", "pydantic", "nltk", "pycocoevalcap", "numpy", "datasets", "h5py"}
    code = f"import sys, pipelines.video.evaluators\nsys.exit(', '.join({slow} & set(sys.modules)) or 0)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "packages"), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "task"), TASKS.items())
def test_the_eight_benchmarks_are_registered_and_write_files(name: str, task: str) -> None:
    evaluator = get(name)
    assert (evaluator.name, evaluator.benchmark, evaluator.task.name) == (f"video/{name}", name, task)
    assert isinstance(evaluator, FileWriter)
    assert evaluator.max_new_tokens == (40 if name == "coco_caption" else 20)
    assert evaluator.greedy_in_reference is (name in ("vqa", "gqa"))


@pytest.mark.parametrize(("name", "task"), TASKS.items())
@pytest.mark.parametrize("split", ["test", "val"])
def test_an_empty_folder_is_refused_with_what_belongs_there(name: str, task: str, split: str, tmp_path: Path) -> None:
    message = rf"The task {task} has no {split} annotations: .* must hold .*json.* Put the file there"
    with pytest.raises(DataError, match=message):
        get(name).load(settings(tmp_path, split=split))


def test_a_row_is_the_example_and_what_scoring_needs(tmp_path: Path) -> None:
    write_tvqa(tmp_path, [tvqa_record(7, show_name="Show")])
    [row] = get("tvqa").load(settings(tmp_path))
    assert row == {
        "id": 7,
        "visuals": ["tv/clip1"],
        "before": "[Subs] ",
        "cuttable": "hello you",
        "after": " [Q] Why? [TS] (1.0-2.5) [Choices] a0: choice 0. a1: choice 1. a2: choice 2. a3: choice 3. "
        "a4: choice 4. tvqa: ",
        "targets": [["a2", 1.0]],
        "kind": "Show",
    }
    assert Example.from_json(row).to_json() == {key: value for key, value in row.items() if key != "kind"}
    assert json.loads(json.dumps(row)) == row


def test_a_prediction_is_the_row_without_the_subtitles_and_with_the_judgement(tmp_path: Path) -> None:
    write_tvqa(tmp_path, [tvqa_record(7)])
    [row] = get("tvqa").load(settings(tmp_path))
    kept = {key: value for key, value in row.items() if key != "cuttable"}
    assert get("tvqa").prediction(row, "a2") == {
        **kept,
        "task": "video/tvqa",
        "text": "a2",
        "pred": 2,
        "correct": True,
    }


@pytest.mark.parametrize(
    ("changes", "num_beams", "max_new_tokens"),
    [
        ({}, 5, 20),
        ({"num_beams": 3, "max_new_tokens": 7}, 3, 7),
        ({"reference_decoding": True}, 1, 20),
    ],
)
def test_the_model_is_shown_the_examples_and_told_how_to_write(
    changes: dict[str, Any],
    num_beams: int,
    max_new_tokens: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = answering(monkeypatch, ["yes", "no"])
    write(tmp_path / "GQA/testdev.json", [gqa_record(1), gqa_record(2)])
    section = settings(tmp_path, **changes)
    rows = get("gqa").load(section)
    predictions = get("gqa").predict(rows, context_of(section))
    [call] = calls
    assert call == {
        "examples": [Example.from_json(row) for row in rows],
        "task": "gqa",
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
    }
    assert [prediction["correct"] for prediction in predictions] == [True, False]
    assert get("gqa").predict([], context_of(section)) == []
    assert len(calls) == 2, "every rank calls, also with no rows"


def test_the_reference_decodes_only_vqa_and_gqa_greedily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answering(monkeypatch, ["a2"])
    write_tvqa(tmp_path, [tvqa_record(7)])
    section = settings(tmp_path, reference_decoding=True)
    get("tvqa").predict(get("tvqa").load(section), context_of(section))
    assert calls[0]["num_beams"] == 5


def test_an_evaluation_leaves_scores_predictions_and_submissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, ["yes", "no"])
    write(tmp_path / "GQA/testdev.json", [gqa_record(1), gqa_record(2)])
    run_evaluators([get("gqa")], context_of(settings(tmp_path)), tmp_path / "out")
    [metric] = read_results(tmp_path / "out")
    assert (metric.name, metric.value, len(metric.dataset_hash)) == ("video/gqa", 0.5, 64)
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert files == ["predictions.jsonl", "results.json", "submissions/gqa_test_predictions.json"]


def test_rows_without_answers_have_no_score_and_are_submitted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, ["yes", "a person"])
    write(tmp_path / "GQA/testdev.json", [gqa_record(1, None), gqa_record(2, None)])
    assert run_evaluators([get("gqa")], context_of(settings(tmp_path)), tmp_path / "out") == []
    submitted = json.loads((tmp_path / "out/submissions/gqa_test_predictions.json").read_text(encoding="utf-8"))
    assert submitted == [
        {"questionId": "q1", "prediction": "yes"},
        {"questionId": "q2", "prediction": "a person"},
    ]


def test_the_best_constant_answer_has_the_highest_mean_worth_and_comes_first_among_equals() -> None:
    worths = [{"yes": 0.3, "no": 1.0}, {"yes": 1.0}, {}, {"no": 0.3}]
    assert best_constant(worths) == {"majority": pytest.approx(1.3 / 4), "majority_answer": "yes"}
    assert best_constant([{}, {}]) == {"majority": 0.0, "majority_answer": ""}
