"""GQA: compositional questions with one answer each, matched exactly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_core.evaluation.results import Metric, accuracy_metric
from dora_core.registry import EVALUATORS
from pipelines.vlm.evaluators.files import first_folder, look_up, need_file, read_entries
from pipelines.vlm.evaluators.questions import SHORT_ANSWER, QuestionEvaluator, Row, commonest, read_questions

if TYPE_CHECKING:
    from pipelines.vlm.config import EvaluateSection

LLAVA_QUESTIONS = "gqa/llava_gqa_testdev_balanced.jsonl"
OFFICIAL_QUESTIONS = ("gqa/testdev_balanced_questions.json", "gqa/data/testdev_balanced_questions.json")
IMAGES = ("gqa/data/images", "gqa/images")


class GQA(QuestionEvaluator):
    """GQA's testdev_balanced: 12,578 questions, in the order of LLaVA's file if that is there."""

    name = "vlm/gqa"

    def read(self, root: Path, section: EvaluateSection) -> list[Row]:
        """Return the questions with their answers, which only the official file has."""
        path = need_file(root, OFFICIAL_QUESTIONS, f"{self.name} needs its questions and answers")
        entries = read_entries(path, {"question": str, "answer": str, "imageId": str})
        images = first_folder(root, IMAGES)
        if not (root / LLAVA_QUESTIONS).is_file():
            return [_official_row(question_id, entry, images) for question_id, entry in entries.items()]
        rows = read_questions(root / LLAVA_QUESTIONS, images)
        return [{**row, "answer": look_up(entries, str(row["question_id"]), path)["answer"]} for row in rows]

    def judge(self, row: Row, text: str) -> dict[str, Any]:
        """Return the answer without final full stops, in lower case, and whether it is the right one."""
        pred = text.rstrip(".").lower()
        return {"pred": pred, "correct": pred == row["answer"]}

    def score(self, predictions: list[Row]) -> list[Metric]:
        """Return the accuracy, beside the share of the commonest answer."""
        answer, share = commonest(row["answer"] for row in predictions)
        extra = {"majority": share, "majority_answer": answer}
        return [accuracy_metric(self.name, [row["correct"] for row in predictions], extra=extra)]

    def submissions(self, predictions: list[Row], root: Path) -> dict[str, Any]:
        """Return what GQA's eval.py reads."""
        answers = [{"questionId": str(row["question_id"]), "prediction": row["pred"]} for row in predictions]
        return {"testdev_balanced_predictions.json": answers}


def _official_row(question_id: str, entry: Row, images: str) -> Row:
    return {
        "question_id": question_id,
        "prompt": f"{entry['question']}\n{SHORT_ANSWER}",
        "image": f"{images}/{entry['imageId']}.jpg",
        "answer": entry["answer"],
    }


EVALUATORS.register(GQA.name)(GQA())
