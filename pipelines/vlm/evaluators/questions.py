"""What the benchmarks share: questions about images, answered in words, judged one by one, then counted."""

from __future__ import annotations

import base64
import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_core.evaluation.results import Metric, replace_file
from pipelines.vlm.evaluators.files import need_images, problem, read_lines

if TYPE_CHECKING:
    from dora_core.evaluation.evaluator import EvaluationContext
    from pipelines.vlm.config import EvaluateSection

SHORT_ANSWER = "Answer the question using a single word or phrase."
QUESTION_ID = (int, str)
"""Types of a question's id; it goes into submissions as it came."""

Row = dict[str, Any]


class QuestionEvaluator(ABC):
    """One benchmark.

    A row has ``question_id``, ``prompt`` (the user's text without the image's mark), and ``image``, a path under
    ``evaluate.path``, or ``image_base64``, the encoded image itself, or neither; and what ``judge`` needs. So rows,
    and their hash, do not tell where the data lies. The first metric of ``score`` is the one that the paper reports.
    """

    name: str
    """The registry name, such as ``vlm/gqa``."""
    max_new_tokens = 128
    """The length of an answer unless ``evaluate.max_new_tokens`` says otherwise."""

    @abstractmethod
    def read(self, root: Path, section: EvaluateSection) -> list[Row]:
        """Return all rows of the benchmark in the folder ``root``; raises ``DataError``."""

    @abstractmethod
    def judge(self, row: Row, text: str) -> dict[str, Any]:
        """Return ``pred``, the answer that ``text`` gives to ``row``, and where known ``correct`` or ``score``."""

    @abstractmethod
    def score(self, predictions: list[Row]) -> list[Metric]:
        """Return the metrics, first the reported one; none if the answers are not known here."""

    def select(self, rows: list[Row], limit: int) -> list[Row]:
        """Return the rows that ``evaluate.limit`` leaves."""
        return rows[:limit]

    def answer_prompt(self, prediction: Row) -> str:
        """Return the prompt as LLaVA's answer file has it."""
        return prediction["prompt"]

    def submissions(self, predictions: list[Row], root: Path) -> dict[str, Any]:
        """Return by file name the JSON documents that an evaluation server or the official scorer takes."""
        return {}

    @property
    def task(self) -> str:
        """The benchmark's name without the pipeline's."""
        return self.name.partition("/")[2]

    def load(self, section: EvaluateSection) -> list[Row]:
        """Return the rows to score; raises ``DataError`` for missing and for malformed files, images included."""
        root = Path(section.path)
        rows = self.read(root, section)
        if section.limit is not None:
            rows = self.select(rows, section.limit)
        if not rows:
            raise problem(f"{self.name} has 0 questions in {root}; at least one is needed. Check its files.")
        need_images(rows, root)
        return rows

    def predict(self, rows: list[Row], context: EvaluationContext) -> list[Row]:
        """Return each row, but for an image in it, with ``task``, ``text`` and its judgement; every rank calls it."""
        from pipelines.vlm.answering import answer_questions

        section = context.section
        texts = answer_questions(
            [row["prompt"] for row in rows],
            [_image(row, Path(section.path)) for row in rows],
            context,
            self.max_new_tokens if section.max_new_tokens is None else section.max_new_tokens,
        )
        return [self.prediction(row, text) for row, text in zip(rows, texts, strict=True)]

    def prediction(self, row: Row, text: str) -> Row:
        """Return the record of one answer."""
        kept = {key: value for key, value in row.items() if key != "image_base64"}
        return {**kept, "task": self.name, "text": text, **self.judge(row, text)}

    def write_files(self, predictions: list[Row], folder: Path, context: EvaluationContext) -> None:
        """Write LLaVA's answer file ``answers/<task>.jsonl`` and what there is to submit into ``submissions/``."""
        model_id = context.extra.get("model_id", "")
        answers = (_json(self._answer(prediction, model_id)) for prediction in predictions)
        _write(folder / "answers" / f"{self.task}.jsonl", answers)
        for name, document in self.submissions(predictions, Path(context.section.path)).items():
            _write(folder / "submissions" / name, [_json(document)])

    def _answer(self, prediction: Row, model_id: str) -> dict[str, Any]:
        answer = {
            "question_id": prediction["question_id"],
            "prompt": self.answer_prompt(prediction),
            "text": prediction["text"],
        }
        digest = hashlib.sha256(_json([self.name, model_id, answer]).encode("utf-8")).hexdigest()
        return {**answer, "answer_id": digest[:22], "model_id": model_id, "metadata": {}}


def read_questions(path: Path, folder: str) -> list[Row]:
    """Return the rows of one of LLaVA's question files, whose images lie in ``folder`` under ``evaluate.path``."""
    lines = read_lines(path, {"question_id": QUESTION_ID, "image": str, "text": str})
    return [
        {"question_id": line["question_id"], "prompt": line["text"], "image": f"{folder}/{line['image']}"}
        for line in lines
    ]


def select_evenly(rows: list[Row], limit: int, kind: Callable[[Row], str | bool]) -> list[Row]:
    """Return ``limit`` rows, in order: the first of each kind in turn, the kinds in their own order."""
    seen: Counter[str | bool] = Counter()
    turns = []
    for place, row in enumerate(rows):
        turns.append((seen[kind(row)], kind(row), place))
        seen[kind(row)] += 1
    return [rows[place] for place in sorted(place for _, _, place in sorted(turns)[:limit])]


def commonest(answers: Iterable[str]) -> tuple[str, float]:
    """Return the commonest answer and its share: what a model scores that knows only that."""
    counts = Counter(answers)
    [(answer, count)] = counts.most_common(1)
    return answer, count / counts.total()


def _image(row: Row, root: Path) -> str | bytes | None:
    if "image_base64" in row:
        return base64.b64decode(row["image_base64"])
    return None if row["image"] is None else str(root / row["image"])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lines)
