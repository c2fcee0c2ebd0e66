"""VQAv2, VizWiz and TextVQA: open questions with several annotators' answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_core.evaluation.evaluator import EvaluationContext
from dora_core.registry import EVALUATORS
from pipelines.vlm.evaluators.textvqa import question_of
from pipelines.vlm.evaluators.vqa import best_constant

VQAV2, VIZWIZ, TEXTVQA = (EVALUATORS.get(f"vlm/{name}") for name in ("vqav2", "vizwiz", "textvqa"))
SHORT = "\nAnswer the question using a single word or phrase."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
TEN_ANSWERS = ["two"] * 3 + ["2 dogs"] * 7


def settings(root: Path, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"path": str(root), "limit": None, **changes})


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def answered(evaluator: Any, root: Path, texts: Sequence[str], **changes: Any) -> list[dict[str, Any]]:
    rows = evaluator.load(settings(root, **changes))
    return [evaluator.prediction(row, text) for row, text in zip(rows, texts, strict=True)]


def submitted(evaluator: Any, root: Path, predictions: list[dict[str, Any]], name: str) -> Any:
    context = EvaluationContext(model=None, tokenizer=None, section=settings(root))
    evaluator.write_files(predictions, root / "out", context)
    return json.loads((root / "out" / "submissions" / name).read_text(encoding="utf-8"))


def write_vqav2_test(root: Path) -> None:
    rows = [
        {"question_id": number, "image": f"COCO_test2015_{number}.jpg", "text": f"Question {number}?" + SHORT}
        for number in (30, 10)
    ]
    write_lines(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    touch(root, *(f"vqav2/test2015/{row['image']}" for row in rows))


def write_vqav2_official(root: Path, split: str, folder: str) -> None:
    questions = [{"question_id": number, "image_id": 139, "question": f"Question {number}?"} for number in (1, 2)]
    write(root / f"vqav2/v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
    touch(root, f"vqav2/{folder}/COCO_{folder}_000000000139.jpg")


def write_vqav2_annotations(root: Path, *ids: int) -> None:
    annotations = [
        {"question_id": each, "answers": [{"answer": answer, "answer_id": 1} for answer in TEN_ANSWERS]} for each in ids
    ]
    write(root / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def test_vqav2_reads_llavas_file_and_cannot_score_test_dev(tmp_path: Path) -> None:
    write_vqav2_test(tmp_path)
    predictions = answered(VQAV2, tmp_path, ["A dog.", "Ten"])
    assert predictions[0] == {
        "question_id": 30,
        "prompt": "Question 30?" + SHORT,
        "image": "vqav2/test2015/COCO_test2015_30.jpg",
        "task": "vlm/vqav2",
        "text": "A dog.",
        "pred": "dog",
    }
    assert VQAV2.score(predictions) == []


def test_the_submission_of_vqav2_covers_the_whole_test_set_in_its_order(tmp_path: Path) -> None:
    write_vqav2_test(tmp_path)
    write_lines(
        tmp_path / "vqav2/llava_vqav2_mscoco_test2015.jsonl", [{"question_id": each} for each in (10, 20, 30, 40)]
    )
    predictions = answered(VQAV2, tmp_path, ["A dog.", "Ten"])
    assert submitted(VQAV2, tmp_path, predictions, "vqav2.json") == [
        {"question_id": 10, "answer": "10"},
        {"question_id": 20, "answer": ""},
        {"question_id": 30, "answer": "dog"},
        {"question_id": 40, "answer": ""},
    ]


def test_the_submission_of_vqav2_is_what_was_asked_if_the_test_set_is_another_or_unknown(tmp_path: Path) -> None:
    write_vqav2_test(tmp_path)
    expected = [{"question_id": 30, "answer": "dog"}, {"question_id": 10, "answer": "10"}]
    predictions = answered(VQAV2, tmp_path, ["A dog.", "Ten"])
    assert submitted(VQAV2, tmp_path, predictions, "vqav2.json") == expected
    write_lines(tmp_path / "vqav2/llava_vqav2_mscoco_test2015.jsonl", [{"question_id": 10}])
    assert submitted(VQAV2, tmp_path, predictions, "vqav2.json") == expected


def test_vqav2s_validation_split_is_scored_here(tmp_path: Path) -> None:
    write_vqav2_official(tmp_path, "val2014", "val2014")
    write_vqav2_annotations(tmp_path, 1, 2, 3)
    predictions = answered(VQAV2, tmp_path, ["Two.", "no"])
    assert predictions[0]["image"] == "vqav2/val2014/COCO_val2014_000000000139.jpg"
    assert predictions[0]["prompt"] == "Question 1?" + SHORT
    assert [row["score"] for row in predictions] == [pytest.approx(0.9), 0.0]
    [metric] = VQAV2.score(predictions)
    assert (metric.name, metric.metric, metric.n) == ("vlm/vqav2", "vqa_accuracy", 2)
    assert metric.value == pytest.approx(0.45)
    assert metric.stderr == pytest.approx(0.45 / 2**0.5)
    assert metric.extra == {"majority": 1.0, "majority_answer": "2 dogs"}


def test_vqav2s_official_test_questions_are_read_and_annotations_of_another_split_left_aside(tmp_path: Path) -> None:
    write_vqav2_official(tmp_path, "test-dev2015", "test2015")
    write_vqav2_annotations(tmp_path, 7)
    rows = VQAV2.load(settings(tmp_path, limit=1))
    assert [row["image"] for row in rows] == ["vqav2/test2015/COCO_test2015_000000000139.jpg"]
    assert "answers" not in rows[0]


def test_annotations_of_a_part_of_the_questions_are_refused(tmp_path: Path) -> None:
    write_vqav2_official(tmp_path, "val2014", "val2014")
    write_vqav2_annotations(tmp_path, 2)
    with pytest.raises(ValueError, match=r"annotations\.json has answers to 1 of 2 questions; .*same split"):
        VQAV2.load(settings(tmp_path))


@pytest.mark.parametrize("answers", [[], [{"text": "two"}], [3]])
def test_annotators_without_a_text_are_refused(answers: list[Any], tmp_path: Path) -> None:
    write_vqav2_official(tmp_path, "val2014", "val2014")
    write(
        tmp_path / "vqav2/v2_mscoco_val2014_annotations.json",
        {"annotations": [{"question_id": 1, "answers": answers}]},
    )
    with pytest.raises(ValueError, match=r"a question has the answers .*they must be a list of at least one text"):
        VQAV2.load(settings(tmp_path))


def test_a_question_file_without_its_list_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"info": {}})
    with pytest.raises(ValueError, match=r"has no list under 'questions'; .*Download"):
        VQAV2.load(settings(tmp_path))


def test_vizwiz_reads_llavas_file_and_submits_normalized_answers_by_image(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "vizwiz/llava_test.jsonl",
        [{"question_id": 0, "image": "VizWiz_test_00000000.jpg", "text": "What is this?" + UNANSWERABLE + SHORT}],
    )
    touch(tmp_path, "vizwiz/test/VizWiz_test_00000000.jpg")
    predictions = answered(VIZWIZ, tmp_path, ["Unanswerable."])
    assert predictions[0]["image"] == "vizwiz/test/VizWiz_test_00000000.jpg"
    assert VIZWIZ.score(predictions) == []
    assert submitted(VIZWIZ, tmp_path, predictions, "vizwiz.json") == [
        {"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"}
    ]


def test_vizwizs_validation_file_is_asked_as_llava_asks_and_scored_here(tmp_path: Path) -> None:
    answers = [{"answer": answer, "answer_confidence": "yes"} for answer in TEN_ANSWERS]
    write(tmp_path / "vizwiz/val.json", [{"image": "a.jpg", "question": "How many? ", "answers": answers}])
    touch(tmp_path, "vizwiz/val/a.jpg")
    predictions = answered(VIZWIZ, tmp_path, ["2 dogs"])
    assert predictions[0]["prompt"] == "How many? " + UNANSWERABLE + SHORT
    assert (predictions[0]["question_id"], predictions[0]["image"]) == ("a.jpg", "vizwiz/val/a.jpg")
    assert [metric.value for metric in VIZWIZ.score(predictions)] == [1.0]


def test_vizwizs_test_file_comes_before_the_validation_file(tmp_path: Path) -> None:
    write(tmp_path / "vizwiz/val.json", [{"image": "a.jpg", "question": "?", "answers": [{"answer": "x"}]}])
    write(tmp_path / "vizwiz/test.json", [{"image": "b.jpg", "question": "?"}])
    touch(tmp_path, "vizwiz/test/b.jpg")
    [row] = VIZWIZ.load(settings(tmp_path))
    assert row["image"] == "vizwiz/test/b.jpg"
    assert "answers" not in row


def test_vizwiz_refuses_answers_to_a_part_of_its_questions(tmp_path: Path) -> None:
    entries = [{"image": "a.jpg", "question": "?", "answers": [{"answer": "x"}]}, {"image": "b.jpg", "question": "?"}]
    write(tmp_path / "vizwiz/val.json", entries)
    with pytest.raises(ValueError, match=r"val\.json has answers to 1 of 2 questions; .*all or for none"):
        VIZWIZ.load(settings(tmp_path))


def write_textvqa(root: Path) -> None:
    """Write two questions on one image; the annotation file has them in the other order and a third one."""
    data = [
        {"question_id": 3, "image_id": "c", "question": "Third?", "answers": ["x"] * 10},
        {"question_id": 2, "image_id": "b", "question": "What Brand is it?", "answers": ["nikon"] * 10},
        {"question_id": 1, "image_id": "b", "question": "what number?", "answers": TEN_ANSWERS},
    ]
    write(root / "textvqa/TextVQA_0.5.1_val.json", {"data": data})
    rows = [
        {"question_id": "b", "image": "b.jpg", "text": "What number?\nReference OCR token: 2, NIKON" + SHORT},
        {"question_id": "b", "image": "b.jpg", "text": "What brand is it?\nReference OCR token: 2, NIKON" + SHORT},
    ]
    write_lines(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", rows)
    touch(root, "textvqa/train_images/b.jpg", "textvqa/train_images/c.jpg")


def test_textvqa_finds_the_answers_by_image_and_question(tmp_path: Path) -> None:
    write_textvqa(tmp_path)
    predictions = answered(TEXTVQA, tmp_path, ["two", "Nikon"])
    assert [row["image"] for row in predictions] == ["textvqa/train_images/b.jpg"] * 2
    assert [row["score"] for row in predictions] == [pytest.approx(0.9), 1.0]
    [metric] = TEXTVQA.score(predictions)
    assert metric.value == pytest.approx(0.95)
    assert metric.extra["ocr_tokens"] is True
    assert metric.extra["majority"] == 0.5


def test_textvqa_without_llavas_file_asks_without_recognized_words_and_says_so(tmp_path: Path) -> None:
    write_textvqa(tmp_path)
    (tmp_path / "textvqa/llava_textvqa_val_v051_ocr.jsonl").unlink()
    predictions = answered(TEXTVQA, tmp_path, ["y", "Nikon"], limit=2)
    assert [row["prompt"] for row in predictions] == ["Third?" + SHORT, "What Brand is it?" + SHORT]
    assert [row["question_id"] for row in predictions] == ["c", "b"]
    [metric] = TEXTVQA.score(predictions)
    assert (metric.value, metric.extra["ocr_tokens"]) == (0.5, False)


def test_textvqa_refuses_a_question_that_the_annotations_lack(tmp_path: Path) -> None:
    write_textvqa(tmp_path)
    write_lines(
        tmp_path / "textvqa/llava_textvqa_val_v051_ocr.jsonl",
        [{"question_id": "b", "image": "b.jpg", "text": "Who?\nReference OCR token: " + SHORT}],
    )
    with pytest.raises(ValueError, match=r"val\.json has nothing for the question \('b', 'who\?'\)"):
        TEXTVQA.load(settings(tmp_path))


@pytest.mark.parametrize(
    "prompt",
    [
        "What Time?\nReference OCR token: N, u, g0" + SHORT,
        "Reference OCR token: N\nWhat time?" + SHORT,
        "What time?\nReference OCR token: " + SHORT,
        "What time?" + SHORT,
    ],
)
def test_the_question_is_cut_out_of_every_prompt_that_llava_uses(prompt: str) -> None:
    assert question_of(prompt) == "what time?"


def test_the_best_constant_answer_counts_partial_agreement() -> None:
    answers = [["yes"] * 10, ["yes"] * 2 + ["no"] * 8, ["no"] * 3 + ["red"] * 7]
    assert best_constant(answers) == ("no", pytest.approx((0 + 1 + 0.9) / 3))
