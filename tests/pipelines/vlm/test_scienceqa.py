"""Questions with lettered options, and ScienceQA."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_core.evaluation.evaluator import EvaluationContext
from dora_core.registry import EVALUATORS
from pipelines.vlm.evaluators.multiple_choice import letter_of_option, parse_letter

SCIENCEQA = EVALUATORS.get("vlm/scienceqa")
LETTER = "\nAnswer with the option's letter from the given choices directly."


def settings(root: Path, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"path": str(root), "limit": None, **changes})


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def answered(rows: list[dict[str, Any]], texts: Sequence[str]) -> list[dict[str, Any]]:
    return [SCIENCEQA.prediction(row, text) for row, text in zip(rows, texts, strict=True)]


@pytest.mark.parametrize(
    ("text", "num_options", "letter"),
    [
        ("B", 2, "B"),
        ("C", 2, None),
        ("E", 5, "E"),
        ("F", 5, None),
        ("b", 2, None),
        ("B.", 2, None),
        ("B. stockade", 2, "B"),
        ("B) stockade", 2, None),
        ("AB", 2, None),
        ("", 2, None),
        ("The answer is A.", 2, "A"),
        ("The answer is A", 2, None),
        ("So: The answer is A, of course", 2, "A"),
        ("The answer is A. The answer is B.", 2, None),
        ("The answer is D.", 2, None),
    ],
)
def test_a_letter_is_read_as_in_llavas_script(text: str, num_options: int, letter: str | None) -> None:
    assert parse_letter(text, num_options) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("a seed.", "A"),
        ("A LEAF", "B"),
        ("It is a leaf, I think", "B"),
        ("a seed or a leaf", None),
        ("a leaflet", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_an_option_is_recognized_by_its_words_if_it_is_the_only_one(text: str, letter: str | None) -> None:
    assert letter_of_option(text, ["a seed", "a leaf.", "root"]) == letter


def test_the_option_that_is_the_text_comes_before_those_that_are_in_it() -> None:
    assert letter_of_option("dark red", ["red", "dark red"]) == "B"
    assert letter_of_option("very dark red", ["red", "dark red"]) is None
    assert letter_of_option("red", ["red", "red"]) is None


PROBLEMS = {
    "4": {"question": "Which figure?", "choices": ["chiasmus", "apostrophe"], "answer": 1, "hint": "", "image": None},
    "5": {
        "question": "Which could the test show?",
        "choices": ["if", "how", "whether"],
        "answer": 1,
        "hint": "People can use it.\nFigure: a parachute.",
        "image": "image.png",
    },
    "11": {"question": "Which colony?", "choices": ["Maryland", "Ohio"], "answer": 0, "hint": "", "image": "image.png"},
    "99": {"question": "Of the training split?", "choices": ["yes"], "answer": 0, "hint": "", "image": None},
}
PROMPTS = [
    "Which figure?\nA. chiasmus\nB. apostrophe",
    "Context: People can use it.\nFigure: a parachute.\nWhich could the test show?\nA. if\nB. how\nC. whether",
    "Which colony?\nA. Maryland\nB. Ohio",
]


def write_scienceqa(root: Path, *, llava: bool) -> None:
    write(root / "scienceqa/problems.json", PROBLEMS)
    write(root / "scienceqa/pid_splits.json", {"train": ["99"], "test": ["4", "5", "11"]})
    for number in ("5", "11"):
        (root / f"scienceqa/images/test/{number}").mkdir(parents=True)
        (root / f"scienceqa/images/test/{number}/image.png").write_bytes(b"")
    if llava:
        rows = [
            {"id": "4", "conversations": [{"from": "human", "value": PROMPTS[0]}, {"from": "gpt", "value": "B"}]},
            {
                "id": "5",
                "image": "5/image.png",
                "conversations": [{"from": "human", "value": f"<image>\n{PROMPTS[1]}"}],
            },
            {
                "id": "11",
                "image": "11/image.png",
                "conversations": [{"from": "human", "value": f"{PROMPTS[2]}\n<image>"}],
            },
        ]
        write(root / "scienceqa/llava_test_CQM-A.json", rows)


@pytest.mark.parametrize("llava", [True, False])
def test_scienceqa_is_asked_the_same_from_either_file(llava: bool, tmp_path: Path) -> None:
    write_scienceqa(tmp_path, llava=llava)
    rows = SCIENCEQA.load(settings(tmp_path))
    assert [row["prompt"] for row in rows] == [prompt + LETTER for prompt in PROMPTS]
    assert [row["image"] for row in rows] == [
        None,
        "scienceqa/images/test/5/image.png",
        "scienceqa/images/test/11/image.png",
    ]
    assert rows[1]["options"] == ["if", "how", "whether"]
    assert [row["answer"] for row in rows] == ["B", "B", "A"]


def test_scienceqa_reports_the_questions_with_an_image_first(tmp_path: Path) -> None:
    write_scienceqa(tmp_path, llava=True)
    predictions = answered(SCIENCEQA.load(settings(tmp_path)), ["B", "how", "A. Maryland"])
    assert [row["pred"] for row in predictions] == ["B", None, "A"]
    with_image, overall = SCIENCEQA.score(predictions)
    assert (with_image.name, with_image.metric, with_image.value) == ("vlm/scienceqa", "image_accuracy", 0.5)
    assert (overall.name, overall.metric, overall.value) == ("vlm/scienceqa-all", "accuracy", pytest.approx(2 / 3))
    assert (with_image.n, overall.n) == (2, 3)
    assert with_image.extra == {
        "chance": pytest.approx((1 / 3 + 1 / 2) / 2),
        "majority": 0.5,
        "majority_answer": "A",
        "num_unparsed": 1,
    }
    assert overall.extra["majority_answer"] == "B"


def test_the_answer_file_of_scienceqa_marks_the_questions_with_an_image(tmp_path: Path) -> None:
    write_scienceqa(tmp_path, llava=False)
    predictions = answered(SCIENCEQA.load(settings(tmp_path)), ["B", "B", "B"])
    context = EvaluationContext(model=None, tokenizer=None, section=settings(tmp_path))
    SCIENCEQA.write_files(predictions, tmp_path / "out", context)
    lines = (tmp_path / "out/answers/scienceqa.jsonl").read_text(encoding="utf-8")
    prompts = [json.loads(line)["prompt"] for line in lines.splitlines()]
    assert prompts == [
        PROMPTS[0] + LETTER,
        f"<image>\n{PROMPTS[1]}{LETTER}",
        f"<image>\n{PROMPTS[2]}{LETTER}",
    ]


@pytest.mark.parametrize(("limit", "ids"), [(1, ["5"]), (2, ["4", "5"]), (3, ["4", "5", "11"])])
def test_the_limit_of_scienceqa_always_leaves_a_question_with_an_image(
    limit: int, ids: list[str], tmp_path: Path
) -> None:
    write_scienceqa(tmp_path, llava=False)
    assert [row["question_id"] for row in SCIENCEQA.load(settings(tmp_path, limit=limit))] == ids


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pid_splits.json", {"train": []}, r"pid_splits\.json has no list under 'test'"),
        ("pid_splits.json", {"test": ["4", "6"]}, r"problems\.json has nothing for the question '6'"),
        ("pid_splits.json", {"test": ["4"]}, r"vlm/scienceqa has 0 questions with an image"),
        (
            "problems.json",
            {**PROBLEMS, "4": {**PROBLEMS["4"], "answer": 2}},
            r"question 4 has 2 choices and the answer 2",
        ),
        ("problems.json", {**PROBLEMS, "4": {**PROBLEMS["4"], "choices": list("abcdef")}}, r"question 4 has 6 choices"),
        ("problems.json", {"4": {"question": "?", "choices": []}}, r"row 1 is .* it must have 'answer', of type int"),
        ("llava_test_CQM-A.json", [{"id": "4", "conversations": []}], r"row 1 has the conversations \[\]; the first"),
        ("llava_test_CQM-A.json", [{"id": "7", "conversations": [{"value": "?"}]}], r"nothing for the question '7'"),
    ],
)
def test_malformed_files_of_scienceqa_are_refused(name: str, content: Any, message: str, tmp_path: Path) -> None:
    write_scienceqa(tmp_path, llava=False)
    write(tmp_path / "scienceqa" / name, content)
    with pytest.raises(ValueError, match=message):
        SCIENCEQA.load(settings(tmp_path))
