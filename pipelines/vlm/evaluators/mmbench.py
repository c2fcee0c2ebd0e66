"""MMBench: multiple choice in which a question counts only if it is answered right in every order of its options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_core.evaluation.results import Metric
from dora_core.registry import EVALUATORS
from pipelines.vlm.evaluators.files import need_file, problem
from pipelines.vlm.evaluators.multiple_choice import LETTERS, ask, choice_metric, letter_of_option, parse_letter
from pipelines.vlm.evaluators.questions import QuestionEvaluator, Row
from pipelines.vlm.evaluators.tables import Cells, is_empty, read_table, write_workbook

if TYPE_CHECKING:
    from dora_core.evaluation.evaluator import EvaluationContext
    from pipelines.vlm.config import EvaluateSection

DEFAULT_TABLE = "mmbench/mmbench_dev_20230712.tsv"
COLUMNS = ("index", "question", "A", "B", "image")
"""The columns that a table must have; hint, further options, answer and categories are optional."""
NOT_SUBMITTED = frozenset(("image", "source", "comment"))
ROTATION_STEP = 1_000_000
"""The index of a question's next rotation is larger by this."""


class MMBench(QuestionEvaluator):
    """MMBench from its table, with the rotations in it or, under ``evaluate.circular``, with rotations made here."""

    name = "vlm/mmbench"
    max_new_tokens = 1024

    def read(self, root: Path, section: EvaluateSection) -> list[Row]:
        """Return the table's rows, each followed by the rotations made of it."""
        path = _find_table(root)
        rows = [_row(cells, path) for cells in read_table(path, COLUMNS)]
        num_answered = sum(row["answer"] is not None for row in rows)
        if num_answered not in (0, len(rows)):
            raise problem(
                f"{path} has the answers of {num_answered} of {len(rows)} rows; it must have them for all or for none. "
                "Download it again."
            )
        return _with_rotations(rows) if section.circular else rows

    def select(self, rows: list[Row], limit: int) -> list[Row]:
        """Return the first ``limit`` questions with all their rotations."""
        kept = set(list(_by_question(rows))[:limit])
        return [row for row in rows if _question_number(row) in kept]

    def judge(self, row: Row, text: str) -> dict[str, Any]:
        """Return the letter that the text gives, or whose option it names, and whether it is right if that is known."""
        pred = parse_letter(text, len(row["options"])) or letter_of_option(text, row["options"])
        return {"pred": pred} if row["answer"] is None else {"pred": pred, "correct": pred == row["answer"]}

    def score(self, predictions: list[Row]) -> list[Metric]:
        """Return the circular accuracy over questions and, as ``-vanilla``, the accuracy over their first rows.

        Without any rotations the latter is the only one; without answers there is none.
        """
        if predictions[0]["answer"] is None:
            return []
        questions = list(_by_question(predictions).values())
        first_rows = [rows[:1] for rows in questions]
        if all(len(rows) == 1 for rows in questions):
            return [choice_metric(self.name, first_rows)]
        return [
            choice_metric(self.name, questions, metric="circular_accuracy"),
            choice_metric(f"{self.name}-vanilla", first_rows),
        ]

    def write_files(self, predictions: list[Row], folder: Path, context: EvaluationContext) -> None:
        """Write also the workbook that the server takes: the table's rows and columns with the letters given.

        A text that gives no letter goes in as it is, since the server can look for the option that it means.
        """
        super().write_files(predictions, folder, context)
        given = [row for row in predictions if row["cells"] is not None]
        lines = [{**row["cells"], "prediction": row["pred"] or row["text"]} for row in given]
        write_workbook(folder / "submissions" / "mmbench.xlsx", lines)


def _find_table(root: Path) -> Path:
    tables = sorted(path.relative_to(root).as_posix() for path in (root / "mmbench").glob("*.tsv"))
    if DEFAULT_TABLE not in tables and len(tables) > 1:
        raise problem(
            f"{root} has {', '.join(tables)}; there must be {DEFAULT_TABLE} or one table alone. Move the others away."
        )
    return need_file(root, [DEFAULT_TABLE, *tables], f"{MMBench.name} needs its table")


def _row(cells: Cells, path: Path) -> Row:
    index = cells["index"]
    if not index.isdecimal():
        raise problem(f"{path} has the index {index!r}; it must be a whole number. Download the table again.")
    options = _options(cells)
    answer = None if is_empty(cells.get("answer", "")) else cells["answer"]
    if len(options) < 2 or answer not in (None, *LETTERS[: len(options)]):
        raise problem(
            f"{path}: row {index} has {len(options)} options and the answer {answer!r}; it must have at least two and "
            "the letter of one of them, or no answer. Download the table again."
        )
    hint = cells.get("hint", "")
    question = cells["question"] if is_empty(hint) else f"{hint}\n{cells['question']}"
    submitted = {name: cell for name, cell in cells.items() if name not in NOT_SUBMITTED}
    return {
        "question_id": int(index),
        "question": question,
        "options": options,
        "prompt": ask(question, options),
        "answer": answer,
        "image_base64": cells["image"],
        "cells": {**submitted, "index": int(index)},
    }


def _options(cells: Cells) -> list[str]:
    """Return the options up to the first empty one."""
    texts = [cells.get(letter, "") for letter in LETTERS]
    return texts[: next((place for place, text in enumerate(texts) if is_empty(text)), len(texts))]


def _question_number(row: Row) -> int:
    return row["question_id"] % ROTATION_STEP


def _by_question(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Return the rows of each question, the one of the smallest index first; questions in the order of the rows."""
    questions: dict[int, list[Row]] = {}
    for row in rows:
        questions.setdefault(_question_number(row), []).append(row)
    return {number: sorted(group, key=lambda row: row["question_id"]) for number, group in questions.items()}


def _with_rotations(rows: list[Row]) -> list[Row]:
    """Return ``rows`` with the other rotations after each row that is the only one of its question."""
    questions = _by_question(rows)
    return [each for row in rows for each in ([row] if len(questions[_question_number(row)]) > 1 else _rotations(row))]


def _rotations(row: Row) -> list[Row]:
    num = len(row["options"])
    return [row, *(_rotated(row, step) for step in range(1, num))]


def _rotated(row: Row, step: int) -> Row:
    """Return ``row`` with its first ``step`` options moved to the end; it belongs to no line of the table."""
    options = row["options"][step:] + row["options"][:step]
    answer = row["answer"]
    if answer is not None:
        answer = LETTERS[(LETTERS.index(answer) - step) % len(options)]
    return {
        **row,
        "question_id": row["question_id"] + step * ROTATION_STEP,
        "options": options,
        "prompt": ask(row["question"], options),
        "answer": answer,
        "cells": None,
    }


EVALUATORS.register(MMBench.name)(MMBench())
