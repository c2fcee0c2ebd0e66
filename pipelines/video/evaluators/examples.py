"""What the benchmarks share: a task's annotations as examples, texts written for them, files to submit."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_core.evaluation.results import Metric, replace_file
from pipelines.video import tasks  # noqa: F401 (importing it makes the tasks)
from pipelines.video.task import Annotations, Example, Record, RecordError, Split, Task, get_task

if TYPE_CHECKING:
    from dora_core.evaluation.evaluator import EvaluationContext
    from pipelines.video.config import EvaluateSection

Row = dict[str, Any]


class ExampleEvaluator(ABC):
    """One benchmark: a task's annotations of one split.

    A row is an ``Example`` as JSON and what ``fields`` adds; its ``targets`` are the answers, none where they are not
    known. The first metric of ``score`` is the one that the paper reports.
    """

    name: str
    """The registry name, such as ``video/vqa``."""
    task_name: str
    max_new_tokens = 20
    """The length of a text unless ``evaluate.max_new_tokens`` says otherwise."""
    greedy_in_reference = False
    """Whether the paper's code decodes this greedily, whatever number of beams it is told."""

    @property
    def task(self) -> Task:
        """The task whose annotations are asked."""
        return get_task(self.task_name)

    @property
    def benchmark(self) -> str:
        """The name without the pipeline's."""
        return self.name.partition("/")[2]

    @abstractmethod
    def judge(self, row: Row, text: str) -> dict[str, Any]:
        """Return ``pred``, what ``text`` answers to ``row``, and where known what it is worth."""

    @abstractmethod
    def score(self, predictions: list[Row]) -> list[Metric]:
        """Return the metrics, first the reported one; none if the answers are not known here."""

    @abstractmethod
    def submissions(self, predictions: list[Row], split: Split) -> dict[str, list[str]]:
        """Return by name the lines (with their ends) of the files that a server or an official scorer takes."""

    def fields(self, record: Record) -> dict[str, Any]:
        """Return what a row has besides the example; raises ``KeyError`` for what the annotation lacks."""
        return {}

    def complete(self, rows: list[Row], root: Path) -> list[Row]:
        """Return the rows with what other files know; raises ``DataError`` for answers to some of them only."""
        num_answered = sum(bool(row["targets"]) for row in rows)
        if num_answered not in (0, len(rows)):
            raise problem(
                f"{self.name} has the answers to {num_answered} of {len(rows)} annotations; it must have them for all "
                "or for none. Remove the annotations without an answer, or download the file again."
            )
        return rows

    def load(self, section: EvaluateSection) -> list[Row]:
        """Return the rows of ``section.split`` under ``section.path``, at most ``section.limit`` of them.

        Raises ``DataError`` or ``RecordError``, both a ``ValueError``, for missing and for malformed files.
        """
        root = Path(section.path)
        records, annotations = self.task.read(root, section.split)
        rows = [self._row(record, annotations) for record in records[: section.limit]]
        if not rows:
            raise problem(
                f"{self.name} has 0 annotations of the split {section.split} in {root}; at least one is needed. Check "
                f"{self.task.all_files(section.split)} and evaluate.limit."
            )
        [(commonest, count)] = Counter(str(row["id"]) for row in rows).most_common(1)
        if count > 1:
            raise problem(
                f"{self.name} has {count} annotations with the id {commonest}; each id must occur once. Remove the "
                f"others from {self.task.all_files(section.split)}."
            )
        return self.complete(rows, root)

    def predict(self, rows: list[Row], context: EvaluationContext) -> list[Row]:
        """Return each row with ``task``, ``text`` and its judgement, as ``prediction`` does; every rank calls it."""
        texts = self.write_texts([Example.from_json(row) for row in rows], context)
        return [self.prediction(row, text) for row, text in zip(rows, texts, strict=True)]

    def write_texts(self, examples: list[Example], context: EvaluationContext) -> list[str]:
        """Return what the model writes for each example, ends stripped; every rank calls it."""
        from pipelines.video.answering import generate_targets

        section = context.section
        return generate_targets(
            examples,
            self.task,
            context,
            num_beams=1 if self.greedy_in_reference and section.reference_decoding else section.num_beams,
            max_new_tokens=self.max_new_tokens if section.max_new_tokens is None else section.max_new_tokens,
        )

    def prediction(self, row: Row, text: str) -> Row:
        """Return the record of one text: the row, but for what could be cut (long subtitles), and the judgement."""
        kept = {key: value for key, value in row.items() if key != "cuttable"}
        return {**kept, "task": self.name, "text": text, **self.judge(row, text)}

    def write_files(self, predictions: list[Row], folder: Path, context: EvaluationContext) -> None:
        """Write what there is to submit into ``submissions/``, also where the answers are not known here."""
        for name, lines in self.submissions(predictions, context.section.split).items():
            path = folder / "submissions" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, lines)

    def _row(self, record: Record, annotations: Annotations) -> Row:
        example = self.task.checked_example(record, annotations)
        try:
            return {**example.to_json(), **self.fields(record)}
        except KeyError as error:
            raise RecordError(
                f"The {self.task_name} annotation {example.id} has no {error}; it has {', '.join(record)}. Add it in "
                f"{self.task.all_files(annotations.split)}."
            ) from None


def problem(text: str) -> ValueError:
    """Return the ``DataError`` that says ``text``; its module is imported only now."""
    from dora_core.data.rows import DataError

    return DataError(text)


def best_constant(worths: Iterable[Mapping[str, float]]) -> dict[str, Any]:
    """Return what a metric's ``extra`` says of the answer that is best if given to every row.

    ``worths`` has each row's possible answers with what each is worth there. ``majority`` is the mean worth.
    """
    totals: Counter[str] = Counter()
    num_rows = 0
    for worth in worths:
        totals.update(worth)
        num_rows += 1
    [(answer, total)] = totals.most_common(1) or [("", 0.0)]
    return {"majority": total / num_rows, "majority_answer": answer}


def json_line(value: Any) -> str:
    """Return ``value`` as one line of JSON, with its end."""
    return json.dumps(value, ensure_ascii=False) + "\n"
