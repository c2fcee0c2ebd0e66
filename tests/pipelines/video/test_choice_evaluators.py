"""NLVR2, TVQA and How2QA: how a text becomes an answer, how answers are counted and submitted."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dora_core.evaluation.evaluator import EvaluationContext
from pipelines.video.evaluators.nlvr2 import NLVR2, all_right, sentence_of
from pipelines.video.evaluators.questions import TVQA, How2QA, lenient_choice
from pipelines.video.task import RecordError

IDENTIFIERS = ("test1-0-0-0", "test1-0-1-0", "test1-0-0-1", "test1-3-0-0", "test1-3-1-0")

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


def write_nlvr2(root: Path, labels: list[int | None], identifiers: tuple[str, ...] = IDENTIFIERS) -> None:
    records = [
        {"uid": f"u{place}", "identifier": name, "img0": f"{place}-img0", "img1": f"{place}-img1", "sent": "Two dogs."}
        | ({} if label is None else {"label": label})
        for place, (name, label) in enumerate(zip(identifiers, labels, strict=True))
    ]
    write(root / "nlvr/test.json", records)


def test_nlvr2_counts_answers_and_statements_that_were_judged_rightly_throughout(tmp_path: Path) -> None:
    write_nlvr2(tmp_path, [1, 0, 1, 0, 1])
    rows = NLVR2().load(settings(tmp_path))
    assert rows[0]["visuals"] == ["nlvr/0-img0", "nlvr/0-img1"]
    predictions = answered(NLVR2(), rows, ["true", "false", "true", "true", "true"])
    accuracy, consistency = NLVR2().score(predictions)
    assert (accuracy.metric, accuracy.value, accuracy.n) == ("accuracy", 4 / 5, 5)
    assert accuracy.extra == {"chance": 0.5, "majority": 0.6, "majority_answer": "true"}
    assert (consistency.name, consistency.metric, consistency.n) == ("video/nlvr2", "consistency", 3)
    assert consistency.value == pytest.approx(2 / 3)  # 0-*-0 and 0-*-1, not 3-*-0
    assert consistency.stderr == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 3))
    assert consistency.extra == {"majority": pytest.approx(1 / 3), "majority_answer": "true"}


def test_nlvr2_submits_identifiers_with_true_and_false_whether_or_not_it_can_score(tmp_path: Path) -> None:
    write_nlvr2(tmp_path, [None] * 5)
    predictions = answered(NLVR2(), NLVR2().load(settings(tmp_path)), ["true", "false", "true", "true", "false"])
    assert NLVR2().score(predictions) == []
    assert submitted(NLVR2(), predictions, tmp_path) == {
        "nlvr2_test_predictions.csv": "test1-0-0-0,True\ntest1-0-1-0,False\ntest1-0-0-1,True\ntest1-3-0-0,True\n"
        "test1-3-1-0,False\n"
    }


def test_nlvr2_answers_the_likelier_word_and_false_if_both_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nlvr2(tmp_path, [1, 0, 1, 0, 1])
    rows = NLVR2().load(settings(tmp_path))
    module = ModuleType("pipelines.video.answering")
    asked: list[Any] = []

    def word_scores(examples: Any, task: Any, context: Any, words: Any) -> list[list[float]]:
        asked.append(([each.id for each in examples], task.name, words))
        return [[-1.0, -2.0], [-3.0, -2.5], [-2.0, -2.0], [0.0, -9.0], [-9.0, 0.0]]

    module.word_scores = word_scores
    monkeypatch.setitem(sys.modules, "pipelines.video.answering", module)
    predictions = NLVR2().predict(rows, EvaluationContext(model=None, tokenizer=None, section=settings(tmp_path)))
    assert asked == [(["u0", "u1", "u2", "u3", "u4"], "nlvr2", ("true", "false"))]
    assert [row["text"] for row in predictions] == ["true", "false", "false", "true", "false"]


@pytest.mark.parametrize("identifier", ["test1-0-1", "test1", "a-b-c-d-e", 5])
def test_nlvr2_refuses_an_identifier_of_another_form(identifier: Any, tmp_path: Path) -> None:
    write_nlvr2(tmp_path, [1], (identifier,))
    with pytest.raises(RecordError, match=rf"is {identifier!r}; it must read split-set-pair-sentence.*Correct"):
        NLVR2().load(settings(tmp_path))


def test_nlvr2_needs_identifiers(tmp_path: Path) -> None:
    write(tmp_path / "nlvr/test.json", [{"uid": "u", "img0": "a", "img1": "b", "sent": "x", "label": 1}])
    with pytest.raises(RecordError, match=r"annotation u has no 'identifier'; it has uid, .*Add it in nlvr/test\.json"):
        NLVR2().load(settings(tmp_path))


def test_a_statement_is_known_by_its_identifier_without_the_pair() -> None:
    assert sentence_of("test1-12-3-1") == "test1-12-1"
    assert all_right(["x", "y", "x"], [True, True, False]) == [False, True]


def write_questions(root: Path, name: str, answers: list[int | None], shows: list[str | None]) -> None:
    num_choices, folder, stem, subtitles = {
        "tvqa": (5, "tvqa", "tvqa_test_public", "tv"),
        "how2qa": (4, "how2qa", "how2qa_val_release", "how2"),
    }[name]
    records = [
        {"qid": number, "q": "Why?", "ts": "1-2", "vid_name": "v", **{f"a{n}": "x" for n in range(num_choices)}}
        | ({} if answer is None else {"answer_idx": answer})
        | ({} if show is None else {"show_name": show})
        for number, (answer, show) in enumerate(zip(answers, shows, strict=True), 10)
    ]
    write(root / f"video/ann/{folder}/{stem}.jsonl", records)
    write(root / f"video/ann/{subtitles}_subtitles.jsonl", [{"vid_name": "v", "sub": []}])


def test_tvqa_counts_exact_names_of_choices_also_by_show(tmp_path: Path) -> None:
    write_questions(tmp_path, "tvqa", [1, 1, 4, 0], ["House", "Castle", "House", "House"])
    predictions = answered(TVQA(), TVQA().load(settings(tmp_path)), ["a1", "a1.", "a5", "a3"])
    assert [row["pred"] for row in predictions] == [1, None, None, 3]
    [metric] = TVQA().score(predictions)
    assert (metric.name, metric.metric, metric.value, metric.n) == ("video/tvqa", "accuracy", 0.25, 4)
    assert metric.extra == {
        "chance": 0.2,
        "majority": 0.5,
        "majority_answer": "a1",
        "num_unparsed": 2,
        "by_kind": {"Castle": [0.0, 1], "House": [pytest.approx(1 / 3), 3]},
    }


def test_how2qa_has_four_choices_and_no_shows(tmp_path: Path) -> None:
    write_questions(tmp_path, "how2qa", [3, 0], [None, None])
    predictions = answered(How2QA(), How2QA().load(settings(tmp_path, "val")), ["a3", "a4"])
    [metric] = How2QA().score(predictions)
    assert (metric.value, metric.extra["chance"], metric.extra["num_unparsed"]) == (0.5, 0.25, 1)
    assert "by_kind" not in metric.extra
    texts = submitted(How2QA(), predictions, tmp_path, "val")
    assert texts == {"how2qa_val_predictions.json": '{"10": 3, "11": 0}\n'}


def test_questions_of_no_show_among_others_are_counted_too(tmp_path: Path) -> None:
    write_questions(tmp_path, "tvqa", [1, 1], ["House", None])
    [metric] = TVQA().score(answered(TVQA(), TVQA().load(settings(tmp_path)), ["a1", "a1"]))
    assert metric.extra["by_kind"] == {"House": [1.0, 1], "unknown": [1.0, 1]}


def test_answers_of_a_test_set_are_submitted_under_the_servers_names(tmp_path: Path) -> None:
    write_questions(tmp_path, "tvqa", [None] * 3, [None] * 3)
    predictions = answered(TVQA(), TVQA().load(settings(tmp_path)), ["a4", "what?", "a2 a3"])
    assert TVQA().score(predictions) == []
    assert submitted(TVQA(), predictions, tmp_path) == {"tvqa_test_predictions.json": '{"10": 4, "11": 0, "12": 2}\n'}
    assert [How2QA().submissions(predictions, split).keys() for split in ("val", "test")] == [
        {"how2qa_val_predictions.json"},
        {"how2qa_test_public_predictions.json"},
    ]


@pytest.mark.parametrize(
    ("text", "choice"),
    [("a3", 3), ("a3.", 3), ("b1", 1), ("a", 0), ("", 0), ("3", 0), ("a4", 0), ("a²", 0), ("a-1", 0)],
)
def test_the_server_is_told_the_second_character_if_it_numbers_a_choice(text: str, choice: int) -> None:
    assert lenient_choice(text, 4) == choice
