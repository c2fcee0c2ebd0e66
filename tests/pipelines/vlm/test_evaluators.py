"""What the seven evaluators share, and GQA, the plainest of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_core.evaluation.evaluator import EvaluationContext, FileWriter
from dora_core.evaluation.results import dataset_hash, read_results
from dora_core.evaluation.runner import run_evaluators
from dora_core.registry import EVALUATORS
from pipelines.vlm.evaluators.questions import select_evenly

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("gqa", "mmbench", "pope", "scienceqa", "textvqa", "vizwiz", "vqav2")
GQA = EVALUATORS.get("vlm/gqa")
SHORT = "\nAnswer the question using a single word or phrase."


def settings(root: Path, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"path": str(root), "limit": None, "max_new_tokens": None, "circular": True, **changes})


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


def write_gqa(root: Path, *, llava: bool = True) -> None:
    """Write two questions, which LLaVA's file asks in the other order."""
    official = {
        "201": {"question": "Is it overcast?", "answer": "no", "imageId": "n1"},
        "202": {"question": "Who is wearing the dress?", "answer": "woman", "imageId": "n2"},
    }
    write(root / "gqa/testdev_balanced_questions.json", official)
    touch(root, "gqa/data/images/n1.jpg", "gqa/data/images/n2.jpg")
    if llava:
        rows = [
            {"question_id": "202", "image": "n2.jpg", "text": "Who is wearing the dress?" + SHORT},
            {"question_id": "201", "image": "n1.jpg", "text": "Is it overcast?" + SHORT},
        ]
        write_lines(root / "gqa/llava_gqa_testdev_balanced.jsonl", rows)


def answered(evaluator: Any, rows: list[dict[str, Any]], texts: Sequence[str]) -> list[dict[str, Any]]:
    return [evaluator.prediction(row, text) for row, text in zip(rows, texts, strict=True)]


def context_of(section: SimpleNamespace) -> EvaluationContext:
    return EvaluationContext(model=None, tokenizer=None, section=section, extra={"model_id": "tiny"})


def test_importing_the_evaluators_imports_nothing_that_is_slow() -> None:
    slow = {"torch", "transformers", "pydantic", "PIL", "numpy", "openpyxl", "datasets"}
    code = f"import sys, pipelines.vlm.evaluators\nsys.exit(', '.join({slow} & set(sys.modules)) or 0)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "packages"), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_seven_benchmarks_are_registered_and_write_files() -> None:
    for name in NAMES:
        evaluator = EVALUATORS.get(f"vlm/{name}")
        assert (evaluator.name, evaluator.task) == (f"vlm/{name}", name)
        assert isinstance(evaluator, FileWriter)
        assert evaluator.max_new_tokens == (1024 if name in ("scienceqa", "mmbench") else 128)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_is_refused_with_what_belongs_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"vlm/{name} needs .*{tmp_path} has no {name}/.*evaluate\.path must be .*Put"
    ):
        EVALUATORS.get(f"vlm/{name}").load(settings(tmp_path))


def test_gqa_asks_in_the_order_of_llavas_file_and_takes_answers_from_the_official_one(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    rows = GQA.load(settings(tmp_path))
    assert rows[0] == {
        "question_id": "202",
        "prompt": "Who is wearing the dress?" + SHORT,
        "image": "gqa/data/images/n2.jpg",
        "answer": "woman",
    }
    assert [row["answer"] for row in rows] == ["woman", "no"]


def test_gqa_can_do_without_llavas_file(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    given = GQA.load(settings(tmp_path))
    (tmp_path / "gqa/llava_gqa_testdev_balanced.jsonl").unlink()
    assert GQA.load(settings(tmp_path)) == given[::-1]


def test_gqa_also_looks_where_its_own_archives_unpack(tmp_path: Path) -> None:
    write_gqa(tmp_path, llava=False)
    (tmp_path / "gqa/data/images").rename(tmp_path / "gqa/images")
    (tmp_path / "gqa/testdev_balanced_questions.json").rename(tmp_path / "gqa/data/testdev_balanced_questions.json")
    assert [row["image"] for row in GQA.load(settings(tmp_path))] == ["gqa/images/n1.jpg", "gqa/images/n2.jpg"]


@pytest.mark.parametrize(
    ("text", "correct"),
    [("Woman", True), ("woman.", True), ("WOMAN...", True), ("a woman", False), ("woman .", False), ("", False)],
)
def test_gqa_matches_exactly_but_for_case_and_final_full_stops(text: str, correct: bool) -> None:
    assert GQA.judge({"answer": "woman"}, text)["correct"] is correct


def test_gqa_reports_accuracy_beside_the_commonest_answer() -> None:
    rows = [{"answer": answer, "correct": answer == "yes"} for answer in ("yes", "no", "no", "no")]
    [metric] = GQA.score(rows)
    assert (metric.name, metric.metric, metric.value, metric.n) == ("vlm/gqa", "accuracy", 0.25, 4)
    assert metric.extra == {"majority": 0.75, "majority_answer": "no"}


def test_answers_and_submissions_are_written_as_llava_and_gqa_write_them(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    section = settings(tmp_path)
    predictions = answered(GQA, GQA.load(section), ["Woman.", "Yes"])
    GQA.write_files(predictions, tmp_path / "out", context_of(section))
    lines = (tmp_path / "out/answers/gqa.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = map(json.loads, lines)
    assert len(first.pop("answer_id")) == 22
    assert first == {
        "question_id": "202",
        "prompt": "Who is wearing the dress?" + SHORT,
        "text": "Woman.",
        "model_id": "tiny",
        "metadata": {},
    }
    submitted = json.loads((tmp_path / "out/submissions/testdev_balanced_predictions.json").read_text())
    assert submitted == [{"questionId": "202", "prediction": "woman"}, {"questionId": "201", "prediction": "yes"}]
    GQA.write_files(predictions, tmp_path / "again", context_of(section))
    assert (tmp_path / "again/answers/gqa.jsonl").read_text(encoding="utf-8").splitlines() == lines
    assert second["answer_id"] != json.loads(lines[0])["answer_id"]


def test_predictions_keep_the_row_and_add_task_text_and_judgement(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    [row, _] = GQA.load(settings(tmp_path))
    added = {"task": "vlm/gqa", "text": "Woman", "pred": "woman", "correct": True}
    assert GQA.prediction(row, "Woman") == {**row, **added}


@pytest.mark.parametrize(("given", "used"), [(None, 128), (7, 7)])
def test_the_model_is_shown_the_images_under_the_folder_of_the_settings(
    given: int | None, used: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering = pytest.importorskip("pipelines.vlm.answering")
    write_gqa(tmp_path)
    section = settings(tmp_path, max_new_tokens=given)
    asked: list[Any] = []

    def answer(prompts: Any, images: Any, context: Any, max_new_tokens: int) -> list[str]:
        asked.extend([prompts, images, max_new_tokens])
        return ["no"] * len(prompts)

    monkeypatch.setattr(answering, "answer_questions", answer)
    rows = GQA.load(section)
    predictions = GQA.predict(rows, context_of(section))
    assert asked[0] == [row["prompt"] for row in rows]
    assert asked[1:] == [[str(tmp_path / f"gqa/data/images/{name}.jpg") for name in ("n2", "n1")], used]
    assert [prediction["correct"] for prediction in predictions] == [False, True]
    assert GQA.predict([], context_of(section)) == []


def test_an_evaluation_leaves_scores_predictions_answers_and_submissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering = pytest.importorskip("pipelines.vlm.answering")
    monkeypatch.setattr(answering, "answer_questions", lambda prompts, *_: ["Woman"] * len(prompts))
    write_gqa(tmp_path)
    run_evaluators([GQA], context_of(settings(tmp_path)), tmp_path / "out")
    [metric] = read_results(tmp_path / "out")
    assert (metric.name, metric.value, len(metric.dataset_hash)) == ("vlm/gqa", 0.5, 64)
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert files == [
        "answers/gqa.jsonl",
        "predictions.jsonl",
        "results.json",
        "submissions/testdev_balanced_predictions.json",
    ]


def test_the_limit_keeps_the_first_rows_and_their_images_alone_are_needed(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    (tmp_path / "gqa/data/images/n1.jpg").unlink()
    assert [row["question_id"] for row in GQA.load(settings(tmp_path, limit=1))] == ["202"]
    with pytest.raises(ValueError, match=r"1 of 2 images are missing, such as .*n1\.jpg; .*Download"):
        GQA.load(settings(tmp_path))


def test_the_hash_of_the_rows_does_not_depend_on_where_they_lie(tmp_path: Path) -> None:
    write_gqa(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "far" / "away")
    here, away = (GQA.load(settings(tmp_path / place)) for place in ("here", "far/away"))
    assert dataset_hash(here) == dataset_hash(away)


def test_a_question_that_the_answer_file_lacks_is_refused(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    write_lines(
        tmp_path / "gqa/llava_gqa_testdev_balanced.jsonl", [{"question_id": "7", "image": "n1.jpg", "text": "Why?"}]
    )
    with pytest.raises(ValueError, match=r"questions\.json has nothing for the question '7'; .*same version"):
        GQA.load(settings(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"questions\.json is not JSON .*Download it again"),
        ("[]", r"holds a list; it must hold one JSON object"),
        ("{}", r"vlm/gqa has 0 questions in .*at least one is needed"),
        ('{"1": {"question": "Why?"}}', r"row 1 is .*it must have 'answer', of type str"),
        ('{"1": 3}', r"row 1 is 3; it must have 'question'"),
    ],
)
def test_a_malformed_file_is_refused_with_what_it_should_hold(content: str, message: str, tmp_path: Path) -> None:
    touch(tmp_path, "gqa/testdev_balanced_questions.json")
    (tmp_path / "gqa/testdev_balanced_questions.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        GQA.load(settings(tmp_path))


@pytest.mark.parametrize("line", ['{"question_id": "1", "image": "a.jpg"}', '{"question_id": 1.5, "image": "a.jpg"}'])
def test_a_malformed_line_of_llavas_file_is_refused(line: str, tmp_path: Path) -> None:
    write_gqa(tmp_path)
    (tmp_path / "gqa/llava_gqa_testdev_balanced.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"balanced\.jsonl, row 1 is .*; it must have '\w+', of type .*Correct the row"
    ):
        GQA.load(settings(tmp_path))


def test_an_even_selection_takes_the_first_of_each_kind_and_keeps_the_order() -> None:
    rows = [{"place": place, "kind": kind} for place, kind in enumerate("aaaabbc")]
    chosen = [
        [row["place"] for row in select_evenly(rows, limit, lambda row: row["kind"])] for limit in (1, 3, 5, 6, 9)
    ]
    assert chosen == [[0], [0, 4, 6], [0, 1, 4, 5, 6], [0, 1, 2, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]]
