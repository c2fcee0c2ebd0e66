"""GQA: compositional questions with one answer each, matched exactly."""

from __future__ import annotations

from typing import Any

from dora_core.evaluation.results import Metric, accuracy_metric
from dora_core.registry import EVALUATORS
from pipelines.video.evaluators.examples import ExampleEvaluator, Row, best_constant, json_line
from pipelines.video.task import Record, Split


class GQA(ExampleEvaluator):
    """GQA's testdev_balanced: 12,578 questions, which both splits ask."""

    name = "video/gqa"
    task_name = "gqa"
    greedy_in_reference = True

    def fields(self, record: Record) -> dict[str, Any]:
        """Return the question, which the predictions keep."""
        return {"question": record["sent"]}

    def judge(self, row: Row, text: str) -> dict[str, Any]:
        """Return the text and whether it is the answer, in which case and punctuation count."""
        pred = text.strip()
        answers = [answer for answer, _ in row["targets"]]
        return {"pred": pred, "correct": pred in answers} if answers else {"pred": pred}

    def score(self, predictions: list[Row]) -> list[Metric]:
        """Return the accuracy, beside the share of the commonest answer."""
        if not predictions[0]["targets"]:
            return []
        extra = best_constant(dict.fromkeys((answer for answer, _ in row["targets"]), 1.0) for row in predictions)
        return [accuracy_metric(self.name, [row["correct"] for row in predictions], extra=extra)]

    def submissions(self, predictions: list[Row], split: Split) -> dict[str, list[str]]:
        """Return what GQA's eval.py reads."""
        answers = [{"questionId": str(row["id"]), "prediction": row["pred"]} for row in predictions]
        return {f"gqa_{split}_predictions.json": [json_line(answers)]}


EVALUATORS.register(GQA.name)(GQA())
