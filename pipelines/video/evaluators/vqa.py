"""VQAv2 in Karpathy's split: open questions with ten annotators' answers, all from the official validation set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dora_core.evaluation.results import Metric, mean_metric
from dora_core.evaluation.vqa_accuracy import normalize_prediction, toolkit_accuracy, toolkit_scores
from dora_core.registry import EVALUATORS
from pipelines.video.evaluators.examples import ExampleEvaluator, Row, best_constant, json_line, problem
from pipelines.video.task import Record, Split

ANNOTATIONS = ("vqa/v2_mscoco_val2014_annotations.json", "vqa/v2_mscoco_train2014_annotations.json")
"""The annotators' answers; the second file is read only if the first lacks a question."""


class VQA(ExampleEvaluator):
    """VQAv2, scored by the official toolkit's accuracy where the annotations are there, and by the soft labels."""

    name = "video/vqa"
    task_name = "vqa"
    greedy_in_reference = True

    def fields(self, record: Record) -> dict[str, Any]:
        """Return the question, which the predictions keep."""
        return {"question": record["sent"]}

    def complete(self, rows: list[Row], root: Path) -> list[Row]:
        """Return the rows with the annotators' ``answers``, if any file has them; it must then have all.

        A question may well have no label: none of its answers is among the 3,129 common ones.
        """
        known: dict[Any, list[str]] = {}
        for name in ANNOTATIONS:
            if (root / name).is_file() and any(row["id"] not in known for row in rows):
                known |= read_annotators(root / name)
        num_known = sum(row["id"] in known for row in rows)
        if num_known == 0:
            return rows
        if num_known < len(rows):
            raise problem(
                f"{' and '.join(ANNOTATIONS)} in {root} have the answers to {num_known} of {len(rows)} questions; they "
                "must have them for all or for none. Put both files there, or remove them."
            )
        return [{**row, "answers": known[row["id"]]} for row in rows]

    def judge(self, row: Row, text: str) -> dict[str, Any]:
        """Return the text, its VQA accuracy as ``score``, and as ``topk_score`` what the row's label gives it."""
        pred = text.strip()
        judgement: dict[str, Any] = {"pred": pred}
        if "answers" in row:
            judgement["score"] = toolkit_accuracy(pred, row["answers"])
        if row["targets"]:
            judgement["topk_score"] = dict(row["targets"]).get(pred, 0.0)
        return judgement

    def score(self, predictions: list[Row]) -> list[Metric]:
        """Return the mean VQA accuracy if the annotators' answers are known, and then the mean soft label.

        Each beside the level of the answer that is best if given to every question.
        """
        metrics = []
        if "answers" in predictions[0]:
            extra = best_constant(_constant_worths(row["answers"]) for row in predictions)
            metrics.append(mean_metric(self.name, "vqa_accuracy", [row["score"] for row in predictions], extra=extra))
        if any(row["targets"] for row in predictions):
            extra = best_constant(dict(row["targets"]) for row in predictions)
            scores = [row.get("topk_score", 0.0) for row in predictions]
            metrics.append(mean_metric(self.name, "topk_score", scores, extra=extra))
        return metrics

    def submissions(self, predictions: list[Row], split: Split) -> dict[str, list[str]]:
        """Return what the official toolkit and the server read."""
        answers = [{"question_id": row["id"], "answer": row["pred"]} for row in predictions]
        return {f"vqa_{split}_predictions.json": [json_line(answers)]}


def read_annotators(path: Path) -> dict[Any, list[str]]:
    """Return by question id the annotators' answers of an official file; raises ``DataError`` if it is malformed."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        known = {entry["question_id"]: [each["answer"] for each in entry["answers"]] for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise problem(
            f"{path} cannot be read ({type(error).__name__}: {error}); it must have, under 'annotations', a list of "
            "objects with question_id and answers. Download it again."
        ) from error
    for question, answers in known.items():
        if not answers or not all(isinstance(answer, str) for answer in answers):
            raise problem(
                f"{path}: question {question} has the answers {answers!r}; they must be texts, and at least one. "
                "Download the file again."
            )
    return known


def _constant_worths(answers: list[str]) -> dict[str, float]:
    """Return what a constant answer is worth; what no prediction can be after normalisation is left out."""
    return {
        answer: worth for answer, worth in toolkit_scores(answers).items() if normalize_prediction(answer) == answer
    }


EVALUATORS.register(VQA.name)(VQA())
