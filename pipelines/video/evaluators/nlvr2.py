"""NLVR2: whether a statement is true of two pictures, and whether one is right about a statement every time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dora_core.evaluation.results import Metric, accuracy_metric
from dora_core.registry import EVALUATORS
from pipelines.video.evaluators.examples import ExampleEvaluator, Row, best_constant
from pipelines.video.task import Example, Record, RecordError, Split

if TYPE_CHECKING:
    from dora_core.evaluation.evaluator import EvaluationContext

WORDS = ("true", "false")


class NLVR2(ExampleEvaluator):
    """NLVR2's public test set, test-P, or its development set; answered by the likelier of two words."""

    name = "video/nlvr2"
    task_name = "nlvr2"

    def fields(self, record: Record) -> dict[str, Any]:
        """Return the statement, which the predictions keep, and NLVR2's own name of the annotation."""
        sentence_of(record["identifier"])
        return {"question": record["sent"], "identifier": record["identifier"]}

    def write_texts(self, examples: list[Example], context: EvaluationContext) -> list[str]:
        """Return for each example the word that is likelier where the target begins, ``false`` if both are alike."""
        from pipelines.video.answering import word_scores

        return ["true" if true > false else "false" for true, false in word_scores(examples, self.task, context, WORDS)]

    def judge(self, row: Row, text: str) -> dict[str, Any]:
        """Return the word and whether it is the right one."""
        return {"pred": text, "correct": text == row["targets"][0][0]} if row["targets"] else {"pred": text}

    def score(self, predictions: list[Row]) -> list[Metric]:
        """Return the accuracy and, as NLVR2's metrics.py counts it, the consistency.

        That is the share of statements that were judged rightly of every pair of pictures they were asked about.
        """
        if not predictions[0]["targets"]:
            return []
        extra = best_constant({row["targets"][0][0]: 1.0} for row in predictions)
        constant = [row["targets"][0][0] == extra["majority_answer"] for row in predictions]
        statements = [sentence_of(row["identifier"]) for row in predictions]
        correct = [row["correct"] for row in predictions]
        consistent, consistent_constant = all_right(statements, correct), all_right(statements, constant)
        extra_consistent = {**extra, "majority": sum(consistent_constant) / len(consistent_constant)}
        return [
            accuracy_metric(self.name, correct, extra={"chance": 0.5, **extra}),
            replace(accuracy_metric(self.name, consistent, extra=extra_consistent), metric="consistency"),
        ]

    def submissions(self, predictions: list[Row], split: Split) -> dict[str, list[str]]:
        """Return the lines that NLVR2's metrics.py reads: the identifier, a comma, True or False."""
        return {
            f"nlvr2_{split}_predictions.csv": [f"{row['identifier']},{row['pred'].title()}\n" for row in predictions]
        }


def sentence_of(identifier: Any) -> str:
    """Return what the identifiers of one statement share.

    An identifier reads split-set-pair-sentence, such as ``test1-0-1-0``: a statement was written about a set of
    pictures and is asked about several pairs of them. NLVR2's metrics.py leaves out the pair. Raises ``RecordError``
    for any other form.
    """
    parts = identifier.split("-") if isinstance(identifier, str) else []
    if len(parts) != 4:
        raise RecordError(
            f"nlvr2: an identifier is {identifier!r}; it must read split-set-pair-sentence, such as test1-0-1-0. "
            "Correct nlvr/*.json, or download it again."
        )
    split, pictures, _, sentence = parts
    return f"{split}-{pictures}-{sentence}"


def all_right(groups: Sequence[str], right: Sequence[bool]) -> list[bool]:
    """Return for each group, in order of appearance, whether all its members are right."""
    found: defaultdict[str, bool] = defaultdict(lambda: True)
    for group, each in zip(groups, right, strict=True):
        found[group] = found[group] and each
    return list(found.values())


EVALUATORS.register(NLVR2.name)(NLVR2())
