"""TVQA and How2QA: questions on videos with numbered choices, answered by the choice's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dora_core.evaluation.results import Metric, accuracy_metric
from dora_core.registry import EVALUATORS
from pipelines.video.evaluators.examples import ExampleEvaluator, Row, best_constant, json_line
from pipelines.video.task import Record, Split

WITHOUT_KIND = "unknown"


class ChoiceEvaluator(ExampleEvaluator):
    """A benchmark of VALUE whose answers are ``a0``, ``a1``, ..."""

    num_choices: int
    submitted_as: Mapping[Split, str]
    """What the server calls a split's answers."""

    def fields(self, record: Record) -> dict[str, Any]:
        """Return as ``kind`` the name of the show, None if there is none."""
        return {"kind": record.get("show_name")}

    def judge(self, row: Row, text: str) -> dict[str, Any]:
        """Return the number of the choice whose name the text is, None if it is none, and whether it is right."""
        names = [f"a{number}" for number in range(self.num_choices)]
        pred = names.index(text) if text in names else None
        return {"pred": pred, "correct": text == row["targets"][0][0]} if row["targets"] else {"pred": pred}

    def score(self, predictions: list[Row]) -> list[Metric]:
        """Return the accuracy; in ``extra`` also how many texts name no choice, and value and rows by kind."""
        if not predictions[0]["targets"]:
            return []
        extra = {
            "chance": 1 / self.num_choices,
            **best_constant({row["targets"][0][0]: 1.0} for row in predictions),
            "num_unparsed": sum(row["pred"] is None for row in predictions),
        }
        kinds = accuracy_by_kind(predictions)
        if kinds.keys() != {WITHOUT_KIND}:
            extra["by_kind"] = kinds
        return [accuracy_metric(self.name, [row["correct"] for row in predictions], extra=extra)]

    def submissions(self, predictions: list[Row], split: Split) -> dict[str, list[str]]:
        """Return VALUE's file: by question id the number of the choice, as ``lenient_choice`` reads it."""
        answers = {str(row["id"]): lenient_choice(row["text"], self.num_choices) for row in predictions}
        return {f"{self.submitted_as[split]}_predictions.json": [json_line(answers)]}


class TVQA(ChoiceEvaluator):
    """TVQA: clips of six television shows, five choices."""

    name = "video/tvqa"
    task_name = "tvqa"
    num_choices = 5
    submitted_as = {"val": "tvqa_val", "test": "tvqa_test"}


class How2QA(ChoiceEvaluator):
    """How2QA: clips of instructional videos, four choices."""

    name = "video/how2qa"
    task_name = "how2qa"
    num_choices = 4
    submitted_as = {"val": "how2qa_val", "test": "how2qa_test_public"}


def lenient_choice(text: str, num_choices: int) -> int:
    """Return the choice that the second character of ``text`` numbers, 0 if it numbers none.

    So the paper's code reads its answers when it writes them for the server; its own accuracy wants the exact name.
    """
    digits = [str(number) for number in range(num_choices)]
    return digits.index(text[1]) if text[1:2] in digits else 0


def accuracy_by_kind(predictions: list[Row]) -> dict[str, list[float]]:
    """Return by kind, sorted, its accuracy and its number of rows."""
    kinds: dict[str, list[bool]] = {}
    for row in predictions:
        kinds.setdefault(row["kind"] or WITHOUT_KIND, []).append(row["correct"])
    return {kind: [sum(correct) / len(correct), len(correct)] for kind, correct in sorted(kinds.items())}


for _evaluator in (TVQA(), How2QA()):
    EVALUATORS.register(_evaluator.name)(_evaluator)
