"""Open questions with several annotators' answers: what VQAv2, VizWiz and TextVQA share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dora_core.evaluation.results import Metric, mean_metric
from dora_core.evaluation.vqa_accuracy import answer_scores, normalize_answer, vqa_accuracy
from pipelines.vlm.evaluators.files import problem
from pipelines.vlm.evaluators.questions import QuestionEvaluator, Row


class VQAEvaluator(QuestionEvaluator):
    """A benchmark scored by VQA accuracy; rows whose annotators are known have their ``answers``."""

    def judge(self, row: Row, text: str) -> dict[str, Any]:
        """Return the normalised answer and, where there are annotators, its accuracy as ``score``."""
        judgement: dict[str, Any] = {"pred": normalize_answer(text)}
        if "answers" in row:
            judgement["score"] = vqa_accuracy(text, row["answers"])
        return judgement

    def score(self, predictions: list[Row]) -> list[Metric]:
        """Return the mean VQA accuracy, beside that of the best constant answer; nothing without annotators."""
        if "answers" not in predictions[0]:
            return []
        answer, share = best_constant([row["answers"] for row in predictions])
        extra = {"majority": share, "majority_answer": answer, **self.remarks(predictions)}
        return [mean_metric(self.name, "vqa_accuracy", [row["score"] for row in predictions], extra=extra)]

    def remarks(self, predictions: list[Row]) -> dict[str, Any]:
        """Return what else the metric's ``extra`` should say."""
        return {}


def best_constant(answers: list[list[str]]) -> tuple[str, float]:
    """Return the answer that has the highest mean accuracy when given to every question, and that accuracy."""
    totals: Counter[str] = Counter()
    for one in answers:
        totals.update(answer_scores(one))
    [(answer, total)] = totals.most_common(1)
    return answer, total / len(answers)


def annotators(entry: Row, path: Path) -> list[str]:
    """Return the answers of a question's annotators, which are texts or objects with a text under ``answer``."""
    given = entry["answers"]
    listed = given if isinstance(given, list) else []
    texts = [each.get("answer") if isinstance(each, dict) else each for each in listed]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise problem(
            f"{path}: a question has the answers {str(given)[:200]}; they must be a list of at least one text, or of "
            "objects with a text under 'answer'. Correct the entry, or download the file again."
        )
    return texts


def add_answers(rows: list[Row], known: dict[Any, list[str]], path: Path) -> list[Row]:
    """Return ``rows`` with the annotators' answers from ``path``, if it has any of them; it must then have all."""
    num_known = sum(row["question_id"] in known for row in rows)
    if num_known == 0:
        return rows
    if num_known < len(rows):
        raise problem(
            f"{path} has answers to {num_known} of {len(rows)} questions; it must have them for all or for none. Use "
            "question and annotation files of the same split."
        )
    return [{**row, "answers": known[row["question_id"]]} for row in rows]
