from __future__ import annotations

import base64
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_core.evaluation.evaluator import EvaluationContext
from dora_core.registry import EVALUATORS

MMBENCH = EVALUATORS.get("vlm/mmbench")
LETTER = "\nAnswer with the option's letter from the given choices directly."
RED, BLUE = (base64.b64encode(content).decode() for content in (b"red picture" * 20_000, b"blue picture"))
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category")
SEED = {"index": "7", "question": "Which?", "A": "seed", "B": "leaf", "answer": "A", "image": RED, "source": "web"}
ROOT_QUESTION = {"index": "9", "question": "=What?", "hint": "Look.", "A": "x", "B": "None", "C": "z", "image": BLUE}


def settings(root: Path, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"path": str(root), "limit": None, "circular": True, **changes})


def answered(rows: list[dict[str, Any]], texts: Sequence[str]) -> list[dict[str, Any]]:
    return [MMBENCH.prediction(row, text) for row, text in zip(rows, texts, strict=True)]


def write_workbook(root: Path, predictions: list[dict[str, Any]]) -> Path:
    context = EvaluationContext(model=None, tokenizer=None, section=settings(root))
    MMBENCH.write_files(predictions, root / "out", context)
    return root / "out/submissions/mmbench.xlsx"


def write_table(root: Path, rows: Sequence[dict[str, str]], name: str = "mmbench_dev_20230712") -> None:
    (root / "mmbench").mkdir(parents=True, exist_ok=True)
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    with (root / f"mmbench/{name}.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)


def turned(row: dict[str, str], index: int, options: str, answer: str) -> dict[str, str]:
    """Return a copy of ``row`` as the file itself has it."""
    return {**row, "index": str(index), "answer": answer, **dict(zip("ABC", options.split(), strict=False))}


def test_mmbench_asks_with_hint_and_options_up_to_the_first_empty_one(tmp_path: Path) -> None:
    write_table(tmp_path, [SEED, {**ROOT_QUESTION, "answer": "C"}])
    first, second = MMBENCH.load(settings(tmp_path, circular=False))
    assert first["prompt"] == f"Which?\nA. seed\nB. leaf{LETTER}"
    assert second["prompt"] == f"Look.\n=What?\nA. x\nB. None\nC. z{LETTER}"
    assert (first["question_id"], first["answer"], second["options"]) == (7, "A", ["x", "None", "z"])
    assert (first["image_base64"], second["image_base64"]) == (RED, BLUE)


def test_rotations_are_made_where_the_table_has_none(tmp_path: Path) -> None:
    write_table(tmp_path, [{**ROOT_QUESTION, "answer": "B"}])
    rows = MMBENCH.load(settings(tmp_path))
    assert [row["question_id"] for row in rows] == [9, 1_000_009, 2_000_009]
    assert [row["options"] for row in rows] == [["x", "None", "z"], ["None", "z", "x"], ["z", "x", "None"]]
    assert [row["answer"] for row in rows] == ["B", "A", "C"]
    assert rows[2]["prompt"] == f"Look.\n=What?\nA. z\nB. x\nC. None{LETTER}"
    assert {row["image_base64"] for row in rows} == {BLUE}


def test_a_question_counts_only_if_every_rotation_made_here_is_right(tmp_path: Path) -> None:
    write_table(tmp_path, [SEED, {**SEED, "index": "8"}])
    rows = MMBENCH.load(settings(tmp_path))
    predictions = answered(rows, ["A", "A", "seed", "B. seed"])
    circular, vanilla = MMBENCH.score(predictions)
    assert (circular.name, circular.metric, circular.value, circular.n) == ("vlm/mmbench", "circular_accuracy", 0.5, 2)
    assert (vanilla.name, vanilla.metric, vanilla.value, vanilla.n) == ("vlm/mmbench-vanilla", "accuracy", 1.0, 2)
    assert circular.extra == {"chance": 0.25, "majority": 0.0, "majority_answer": "A", "num_unparsed": 0}
    assert vanilla.extra == {"chance": 0.5, "majority": 1.0, "majority_answer": "A", "num_unparsed": 0}


@pytest.mark.parametrize("circular", [True, False])
def test_rotations_that_the_table_has_are_used(circular: bool, tmp_path: Path) -> None:
    copies = [turned(SEED, 1_000_007, "leaf seed", "B"), SEED, {**SEED, "index": "8"}]
    write_table(tmp_path, copies)
    rows = MMBENCH.load(settings(tmp_path, circular=circular))
    assert [row["question_id"] for row in rows] == [1_000_007, 7, 8, *([1_000_008] if circular else [])]
    predictions = answered(rows, ["A", "A", "A", *(["B"] if circular else [])])
    assert [metric.value for metric in MMBENCH.score(predictions)] == [0.5, 1.0]


def test_without_rotations_there_is_one_plain_accuracy(tmp_path: Path) -> None:
    write_table(tmp_path, [SEED, {**SEED, "index": "8"}])
    rows = MMBENCH.load(settings(tmp_path, circular=False))
    [metric] = MMBENCH.score(answered(rows, ["A", "nonsense"]))
    assert (metric.name, metric.metric, metric.value) == ("vlm/mmbench", "accuracy", 0.5)
    assert metric.extra["num_unparsed"] == 1


def test_the_limit_of_mmbench_counts_questions_and_keeps_their_rotations(tmp_path: Path) -> None:
    write_table(tmp_path, [SEED, {**SEED, "index": "8"}, turned(SEED, 1_000_007, "leaf seed", "B")])
    assert [row["question_id"] for row in MMBENCH.load(settings(tmp_path, limit=1))] == [7, 1_000_007]


def test_a_table_without_answers_gives_a_submission_and_no_score(tmp_path: Path) -> None:
    write_table(tmp_path, [{key: cell for key, cell in SEED.items() if key != "answer"}])
    predictions = answered(MMBENCH.load(settings(tmp_path)), ["A", "B"])
    assert MMBENCH.score(predictions) == []
    assert "correct" not in predictions[0]
    assert write_workbook(tmp_path, predictions).is_file()


def test_predictions_hold_no_images(tmp_path: Path) -> None:
    write_table(tmp_path, [SEED])
    predictions = answered(MMBENCH.load(settings(tmp_path)), ["A", "A"])
    assert RED not in json.dumps(predictions)


def test_the_workbook_has_the_tables_rows_with_the_letters_given(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    write_table(tmp_path, [SEED, {**ROOT_QUESTION, "answer": "C"}])
    rows = MMBENCH.load(settings(tmp_path))
    predictions = answered(rows, ["A", "A", "hard to say\x00", "A", "A"])
    path = write_workbook(tmp_path, predictions)
    lines = list(openpyxl.load_workbook(path).active.values)
    assert lines == [
        ("index", "question", "hint", "A", "B", "C", "answer", "prediction"),
        (7, "Which?", None, "seed", "leaf", None, "A", "A"),
        (9, "=What?", "Look.", "x", "None", "z", "C", "hard to say"),
    ]
    assert openpyxl.load_workbook(path).active["B3"].data_type == "s"
    assert not list(path.parent.glob(".*"))


def test_an_image_may_be_that_of_another_row(tmp_path: Path) -> None:
    write_table(tmp_path, [SEED, {**SEED, "index": "8", "image": "7"}])
    assert {row["image_base64"] for row in MMBENCH.load(settings(tmp_path))} == {RED}


def test_the_only_table_is_used_whatever_its_name_and_several_are_refused(tmp_path: Path) -> None:
    write_table(tmp_path, [SEED], "other")
    assert len(MMBENCH.load(settings(tmp_path))) == 2
    write_table(tmp_path, [SEED], "another")
    with pytest.raises(ValueError, match=r"has mmbench/another\.tsv, mmbench/other\.tsv; there must be .*Move"):
        MMBENCH.load(settings(tmp_path))
    write_table(tmp_path, [SEED, {**SEED, "index": "8"}])
    assert len(MMBENCH.load(settings(tmp_path))) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**SEED, "index": "7.0"}], r"has the index '7\.0'; it must be a whole number"),
        ([{**SEED, "answer": "C"}], r"row 7 has 2 options and the answer 'C'"),
        ([{**SEED, "B": "nan"}], r"row 7 has 1 options"),
        ([{**SEED, "image": "x"}], r"has the image 'x'; it must be in base64"),
        ([{**SEED, "image": ""}], r"has the image ''; it must be in base64"),
        ([SEED, {**SEED, "index": "8", "answer": ""}], r"has the answers of 1 of 2 rows"),
        ([{"index": "7", "question": "Which?"}], r"has 1 rows under the columns \['index', 'question'\]"),
        ([], r"has 0 rows under the columns \[\]"),
    ],
)
def test_malformed_tables_are_refused(rows: list[dict[str, str]], message: str, tmp_path: Path) -> None:
    write_table(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        MMBENCH.load(settings(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"index\tquestion\tA\tB\timage\n1\ta\tb\tc\tZg==\textra\n", "no row longer than the first line"),
        (b"index\tquestion\n1\t\xff\n", "is not a table"),
    ],
)
def test_what_is_no_table_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "mmbench").mkdir()
    (tmp_path / "mmbench/mmbench_dev_20230712.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        MMBENCH.load(settings(tmp_path))
