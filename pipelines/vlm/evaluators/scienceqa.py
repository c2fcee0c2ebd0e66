"""ScienceQA: school questions with two to five options, of which about half come with a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_core.evaluation.results import Metric
from dora_core.registry import EVALUATORS
from pipelines.vlm.evaluators.files import look_up, need_file, problem, read_entries, read_lines, read_mapping
from pipelines.vlm.evaluators.multiple_choice import LETTER_SENTENCE, LETTERS, ask, choice_metric, parse_letter
from pipelines.vlm.evaluators.questions import QUESTION_ID, QuestionEvaluator, Row, select_evenly

if TYPE_CHECKING:
    from pipelines.vlm.config import EvaluateSection

LLAVA_QUESTIONS = "scienceqa/llava_test_CQM-A.json"
PROBLEMS = "scienceqa/problems.json"
SPLITS = "scienceqa/pid_splits.json"
IMAGES = "scienceqa/images/test"
IMAGE_MARK = "<image>"


class ScienceQA(QuestionEvaluator):
    """ScienceQA's test split, from LLaVA's question file or else from the benchmark's own.

    The reported number is the accuracy over the questions with a picture.
    """

    name = "vlm/scienceqa"
    max_new_tokens = 1024

    def read(self, root: Path, section: EvaluateSection) -> list[Row]:
        """Return the questions with options and right letter, which only the benchmark's own file has."""
        path = need_file(root, [PROBLEMS], f"{self.name} needs its answers")
        problems = read_entries(path, {"question": str, "choices": list, "answer": int})
        if (root / LLAVA_QUESTIONS).is_file():
            asked = _llava_rows(root / LLAVA_QUESTIONS)
        else:
            asked = _own_rows(need_file(root, [SPLITS], f"{self.name} needs its questions"), problems, path)
        rows = [{**row, **_answer(row["question_id"], problems, path)} for row in asked]
        if not any(row["image"] for row in rows):
            raise problem(
                f"{self.name} has 0 questions with an image in {root}; the reported accuracy needs at least one. "
                "Download the question file again."
            )
        return rows

    def select(self, rows: list[Row], limit: int) -> list[Row]:
        """Return as many questions with an image, of which there is at least one, as without."""
        return select_evenly(rows, limit, lambda row: row["image"] is None)

    def judge(self, row: Row, text: str) -> dict[str, Any]:
        """Return the letter and whether it is right; None, a text without one, is wrong."""
        pred = parse_letter(text, len(row["options"]))
        return {"pred": pred, "correct": pred == row["answer"]}

    def score(self, predictions: list[Row]) -> list[Metric]:
        """Return the accuracy over questions with an image, then over all."""
        groups = [[row] for row in predictions]
        with_image = [[row] for row in predictions if row["image"]]
        return [
            choice_metric(self.name, with_image, metric="image_accuracy"),
            choice_metric(f"{self.name}-all", groups),
        ]

    def answer_prompt(self, prediction: Row) -> str:
        """Return the prompt with the image's mark, by which LLaVA's scorer knows the questions with an image."""
        return f"{IMAGE_MARK}\n{prediction['prompt']}" if prediction["image"] else prediction["prompt"]


def _llava_rows(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(read_lines(path, {"id": QUESTION_ID, "conversations": list}), 1):
        turn = line["conversations"][0] if line["conversations"] else None
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise problem(
                f"{path}, row {number} has the conversations {str(line['conversations'])[:200]}; the first turn must "
                "have the question under 'value'. Download the file again."
            )
        question = turn["value"].replace(IMAGE_MARK, "").strip()
        image = f"{IMAGES}/{line['image']}" if line.get("image") else None
        rows.append({"question_id": str(line["id"]), "prompt": f"{question}\n{LETTER_SENTENCE}", "image": image})
    return rows


def _own_rows(path: Path, problems: dict[str, Row], problems_path: Path) -> list[Row]:
    ids = read_mapping(path).get("test")
    if not isinstance(ids, list):
        raise problem(f"{path} has no list under 'test'; the ids of the test split must be there. Download it again.")
    return [_own_row(str(each), look_up(problems, str(each), problems_path)) for each in ids]


def _own_row(question_id: str, entry: Row) -> Row:
    hint = (entry.get("hint") or "").strip()
    question = f"Context: {hint}\n{entry['question']}" if hint else entry["question"]
    image = f"{IMAGES}/{question_id}/{entry['image']}" if entry.get("image") else None
    return {"question_id": question_id, "prompt": ask(question, entry["choices"]), "image": image}


def _answer(question_id: str, problems: dict[str, Row], path: Path) -> Row:
    entry = look_up(problems, question_id, path)
    num_options = len(entry["choices"])
    if not 0 <= entry["answer"] < num_options <= len(LETTERS):
        raise problem(
            f"{path}: question {question_id} has {num_options} choices and the answer {entry['answer']}; there must be "
            f"at most {len(LETTERS)} and the answer must be the place of one, from 0. Download the file again."
        )
    return {"options": entry["choices"], "answer": LETTERS[entry["answer"]]}


EVALUATORS.register(ScienceQA.name)(ScienceQA())
