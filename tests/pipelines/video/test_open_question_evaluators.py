"""VQA and GQA: how a text becomes an answer, how answers are counted and submitted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_core.data.rows import DataError
from dora_core.evaluation.evaluator import EvaluationContext
from pipelines.video.evaluators.gqa import GQA
from pipelines.video.evaluators.vqa import VQA

VAL2014 = "vqa/v2_mscoco_val2014_annotations.json"
TRAIN2014 = "vqa/v2_mscoco_train2014_annotations.json"

Row = dict[str, Any]


def settings(root: Path, split: str = "test", **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(path=str(root), split=split, limit=None, **changes)


def write(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))


def answered(evaluator: Any, rows: list[Row], texts: list[str]) -> list[Row]:
    return [evaluator.prediction(row, text) for row, text in zip(rows, texts, strict=True)]


def submitted(evaluator: Any, predictions: list[Row], root: Path, split: str = "test") -> dict[str, str]:
    context = EvaluationContext(model=None, tokenizer=None, section=settings(root, split))
    evaluator.write_files(predictions, root / "out", context)
    return {path.name: path.read_text(encoding="utf-8") for path in (root / "out/submissions").iterdir()}


def write_vqa(root: Path, labels: list[dict[str, float] | None]) -> None:
    records = [
        {"question_id": number, "img_id": f"COCO_val2014_{number:012d}", "sent": "what is it?"}
        | ({} if label is None else {"label": label})
        for number, label in enumerate(labels, 1)
    ]
    write(root / "vqa/karpathy_test.json", records)


def write_annotators(root: Path, answers: dict[int, list[str]], name: str = VAL2014) -> None:
    entries = [
        {"question_id": number, "answers": [{"answer": text, "answer_id": place} for place, text in enumerate(texts)]}
        for number, texts in answers.items()
    ]
    write(root / name, {"info": {}, "annotations": entries})


def test_vqa_is_scored_by_the_official_toolkit_and_by_the_soft_labels(tmp_path: Path) -> None:
    write_vqa(tmp_path, [{"dog": 1.0, "puppy": 0.3}, {"2": 1.0}, {}])
    write_annotators(
        tmp_path,
        {1: ["dog"] * 7 + ["puppy"] * 3, 2: ["2"] * 10, 3: ["red"] * 2 + [f"x{n}" for n in range(8)], 9: ["z"]},
    )
    rows = VQA().load(settings(tmp_path))
    assert rows[0]["visuals"] == ["COCO/COCO_val2014_000000000001"]
    assert (rows[0]["question"], rows[0]["cuttable"]) == ("what is it?", "what is it?")
    predictions = answered(VQA(), rows, ["The puppy.", "two", "red"])
    assert [row["score"] for row in predictions] == pytest.approx([0.9, 1.0, 0.6])
    assert [row.get("topk_score") for row in predictions] == [0.0, 0.0, None], "the exact string; no label at all"
    assert "cuttable" not in predictions[0] and predictions[0]["question"] == "what is it?"
    accuracy, topk = VQA().score(predictions)
    assert (accuracy.name, accuracy.metric, accuracy.n) == ("video/vqa", "vqa_accuracy", 3)
    assert accuracy.value == pytest.approx((0.9 + 1.0 + 0.6) / 3)
    assert accuracy.extra == {"majority": pytest.approx(1 / 3), "majority_answer": "dog"}
    assert (topk.name, topk.metric, topk.value, topk.n) == ("video/vqa", "topk_score", 0.0, 3)
    assert topk.extra == {"majority": pytest.approx(1 / 3), "majority_answer": "dog"}


def test_vqa_without_the_annotators_has_the_soft_labels_alone(tmp_path: Path) -> None:
    write_vqa(tmp_path, [{"dog": 1.0, "puppy": 0.3}, {"cat": 0.6}, {}])
    rows = VQA().load(settings(tmp_path))
    assert all("answers" not in row for row in rows)
    predictions = answered(VQA(), rows, ["puppy", "cat", "red"])
    assert "score" not in predictions[0]
    [topk] = VQA().score(predictions)
    assert (topk.metric, topk.value) == ("topk_score", pytest.approx(0.3))
    assert topk.extra["majority"] == pytest.approx(1 / 3)


def test_a_constant_answer_is_worth_nothing_where_no_prediction_can_be_it(tmp_path: Path) -> None:
    write_vqa(tmp_path, [{}, {}])
    write_annotators(tmp_path, {1: ["the dog"] * 9 + ["cat"], 2: ["the dog"] * 9 + ["cat"]})
    predictions = answered(VQA(), VQA().load(settings(tmp_path)), ["cat", "dog"])
    [accuracy] = VQA().score(predictions)
    assert accuracy.value == pytest.approx(0.15)
    assert accuracy.extra == {"majority": pytest.approx(0.3), "majority_answer": "cat"}


def test_vqa_reads_the_training_annotations_only_for_questions_that_the_others_lack(tmp_path: Path) -> None:
    write_vqa(tmp_path, [{"dog": 1.0}, {"cat": 1.0}])
    (tmp_path / TRAIN2014).write_text("not read")
    write_annotators(tmp_path, {1: ["dog"] * 10, 2: ["cat"] * 10})
    assert [row["answers"][0] for row in VQA().load(settings(tmp_path))] == ["dog", "cat"]
    write_annotators(tmp_path, {1: ["dog"] * 10})
    write_annotators(tmp_path, {2: ["cow"] * 10}, TRAIN2014)
    assert [row["answers"][0] for row in VQA().load(settings(tmp_path))] == ["dog", "cow"]
    (tmp_path / TRAIN2014).unlink()
    with pytest.raises(DataError, match=r"have the answers to 1 of 2 questions; they must have .* Put both files"):
        VQA().load(settings(tmp_path))


def test_vqa_without_any_answers_is_not_scored_and_submitted(tmp_path: Path) -> None:
    write_vqa(tmp_path, [None, None])
    write_annotators(tmp_path, {9: ["x"] * 10})
    predictions = answered(VQA(), VQA().load(settings(tmp_path)), ["Yes", "a dog"])
    assert VQA().score(predictions) == []
    [(name, text)] = submitted(VQA(), predictions, tmp_path).items()
    assert name == "vqa_test_predictions.json"
    assert json.loads(text) == [{"question_id": 1, "answer": "Yes"}, {"question_id": 2, "answer": "a dog"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"KeyError: 'annotations'.*it must have, under 'annotations', .*Download it again"),
        ({"annotations": [{"question_id": 1}]}, r"KeyError: 'answers'"),
        ({"annotations": [{"question_id": 1, "answers": [3]}]}, r"TypeError"),
        ({"annotations": [{"question_id": 1, "answers": []}]}, r"question 1 has the answers \[\]; they must be texts"),
        ({"annotations": [{"question_id": 1, "answers": [{"answer": 3}]}]}, r"question 1 has the answers \[3\]"),
    ],
)
def test_malformed_annotators_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    write_vqa(tmp_path, [{"dog": 1.0}])
    write(tmp_path / VAL2014, content)
    with pytest.raises(DataError, match=message):
        VQA().load(settings(tmp_path))


@pytest.mark.parametrize(
    ("text", "correct"), [("yes", True), (" yes ", True), ("Yes", False), ("yes.", False), ("", False)]
)
def test_gqa_wants_the_very_text_of_the_label(text: str, correct: bool) -> None:
    assert GQA().judge({"targets": [["yes", 1.0]]}, text) == {"pred": text.strip(), "correct": correct}


def test_gqa_reports_accuracy_beside_the_commonest_answer() -> None:
    rows = [{"targets": [[answer, 1.0]], "correct": answer == "yes"} for answer in ("yes", "no", "no", "no")]
    [metric] = GQA().score(rows)
    assert (metric.metric, metric.value, metric.n) == ("accuracy", 0.25, 4)
    assert metric.extra == {"majority": 0.75, "majority_answer": "no"}
