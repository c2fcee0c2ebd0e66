"""The eight commonsense benchmarks of the DoRA paper (Table 1), by generation or by ranking the options.

Importing this module must stay cheap (no torch): listing the evaluators imports it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_core.evaluation.results import Metric, accuracy_metric
from dora_core.registry import EVALUATORS

if TYPE_CHECKING:
    from dora_core.evaluation.evaluator import EvaluationContext
    from pipelines.llm.config import EvaluateSection

DATA_SOURCE = "the folder dataset/ of https://github.com/AGI-Edgerunners/LLM-Adapters"
RESPONSE_MARK = "### Response:"
ANSWER_PREFIX = "the correct answer is "
"""How every training output begins; the option's label follows."""


@dataclass(frozen=True, kw_only=True)
class CommonsenseTask:
    """One benchmark whose rows carry the options in ``instruction`` and the right one's label in ``answer``."""

    name: str
    folder: str
    """Folder of ``test.json`` under ``evaluate.path``."""
    labels: tuple[str, ...]
    """Every label that a row of this task may offer, in order."""
    marker: str | None
    """The word before an option's number in the instruction; None where all rows offer all labels."""

    def extract(self, text: str) -> str | None:
        """Return the first label in what follows the last ``### Response:``, or None.

        As in the paper's code: case matters, words may be part of longer ones, and a negation is not understood.
        """
        hit = re.search("|".join(self.labels), text.rpartition(RESPONSE_MARK)[2])
        return hit.group() if hit else None

    def options(self, row: dict[str, Any]) -> list[str]:
        """Return the labels that this row offers: those it numbers without a gap, from 1 (ARC rows have 3 to 5)."""
        if self.marker is None:
            return list(self.labels)
        numbers = set(re.findall(rf"\b{self.marker}(\d+):", row["instruction"]))
        missing = (place for place in range(len(self.labels)) if str(place + 1) not in numbers)
        return list(self.labels[: next(missing, len(self.labels))])

    def load(self, section: EvaluateSection) -> list[dict[str, Any]]:
        """Return the rows of ``<path>/<folder>/test.json``, at most ``section.limit`` of them.

        Raises ``DataError`` (a ``ValueError``) for a missing file and for a row whose answer is not among its options.
        """
        from dora_core.data.rows import DataError, read_rows, require_fields

        path = Path(section.path) / self.folder / "test.json"
        if not path.is_file():
            raise DataError(
                f"{self.name} has no test rows: {path} is not a file. evaluate.path must be a folder with "
                f"{self.folder}/test.json. Copy it from {DATA_SOURCE}, or set evaluate.path to where it is."
            )
        rows = read_rows(str(path))[: section.limit]
        if not rows:
            raise DataError(f"{path} gives 0 rows; scoring needs at least one. Check the file and evaluate.limit.")
        require_fields(rows, ("instruction", "answer"), str(path))
        for index, row in enumerate(rows):
            if row["answer"] not in self.options(row):
                raise DataError(
                    f"{path}: row {index} has answer {row['answer']!r}; its options are {self.options(row)}. "
                    f"Copy the file again from {DATA_SOURCE}."
                )
        return rows

    def predict(self, rows: list[dict[str, Any]], context: EvaluationContext) -> list[dict[str, Any]]:
        """Return each row with ``output_pred``, ``pred``, ``correct``, ``mode`` and ``task``; every rank must call it.

        Mode ``generate`` searches a continuation and extracts its label. Mode ``rank`` takes the option of the highest
        log-likelihood, the first of equals, and adds ``log_likelihoods``.
        """
        from pipelines.llm.data import render_prompt

        mode = context.section.mode
        prompts = [render_prompt(row, context.extra["template"], for_evaluation=True) for row in rows]
        answers = self._generate(prompts, context) if mode == "generate" else self._rank(rows, prompts, context)
        return [
            {**row, **answer, "correct": answer["pred"] == row["answer"], "mode": mode, "task": self.name}
            for row, answer in zip(rows, answers, strict=True)
        ]

    def score(self, predictions: list[dict[str, Any]]) -> list[Metric]:
        """Return the accuracy over rows, beside the levels of guessing and of always giving the commonest answer."""
        label, share = majority(predictions)
        chances = [1 / len(self.options(row)) for row in predictions]
        extra = {
            "mode": predictions[0]["mode"],
            "chance": sum(chances) / len(chances),
            "majority": share,
            "majority_answer": label,
            "num_unparsed": sum(row["pred"] is None for row in predictions),
        }
        return [accuracy_metric(self.name, [row["correct"] for row in predictions], extra=extra)]

    def _generate(self, prompts: list[str], context: EvaluationContext) -> list[dict[str, Any]]:
        from dora_core.evaluation.generation import generate_texts
        from dora_core.evaluation.runner import equal_calls

        section = context.section
        texts = generate_texts(
            context.model,
            context.tokenizer,
            prompts,
            batch_size=section.batch_size,
            num_beams=section.num_beams,
            max_new_tokens=section.max_new_tokens,
            num_calls=equal_calls(len(prompts), section.batch_size, context),
            synced=context.synced,
            device=context.device,
        )
        return [{"output_pred": text.strip(), "pred": self.extract(text)} for text in texts]

    def _rank(self, rows: list[dict[str, Any]], prompts: list[str], context: EvaluationContext) -> list[dict[str, Any]]:
        from dora_core.evaluation.generation import option_log_likelihoods
        from dora_core.evaluation.runner import equal_calls

        options = [self.options(row) for row in rows]
        scores = option_log_likelihoods(
            context.model,
            context.tokenizer,
            prompts,
            [[ANSWER_PREFIX + label for label in labels] for labels in options],
            batch_size=context.section.batch_size,
            num_calls=equal_calls(sum(map(len, options)), context.section.batch_size, context),
            device=context.device,
        )
        best = [labels[own.index(max(own))] for labels, own in zip(options, scores, strict=True)]
        return [
            {"output_pred": ANSWER_PREFIX + label, "pred": label, "log_likelihoods": own}
            for label, own in zip(best, scores, strict=True)
        ]


def majority(rows: list[dict[str, Any]]) -> tuple[str, float]:
    """Return the commonest answer of ``rows`` and its share: what a model scores that knows only that."""
    [(label, count)] = Counter(row["answer"] for row in rows).most_common(1)
    return label, count / len(rows)


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


TASKS = tuple(
    CommonsenseTask(name=f"llm/{name}", folder=folder, labels=labels, marker=marker)
    for name, folder, labels, marker in (
        ("boolq", "boolq", ("true", "false"), None),
        ("piqa", "piqa", _numbered("solution", 2), "Solution"),
        ("social_i_qa", "social_i_qa", _numbered("answer", 5), "Answer"),
        ("hellaswag", "hellaswag", _numbered("ending", 4), "Ending"),
        ("winogrande", "winogrande", _numbered("option", 2), "Option"),
        ("arc_easy", "ARC-Easy", _numbered("answer", 5), "Answer"),
        ("arc_challenge", "ARC-Challenge", _numbered("answer", 5), "Answer"),
        ("openbookqa", "openbookqa", _numbered("answer", 5), "Answer"),
    )
)
for _task in TASKS:
    EVALUATORS.register(_task.name)(_task)
