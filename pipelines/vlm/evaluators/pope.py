"""POPE: is this object in the picture? Objects that are not are random ones, popular ones or likely company."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_core.evaluation.results import Metric, average_metric
from dora_core.registry import EVALUATORS
from pipelines.vlm.evaluators.files import look_up, need_file, problem, read_lines
from pipelines.vlm.evaluators.questions import SHORT_ANSWER, QuestionEvaluator, Row, select_evenly

if TYPE_CHECKING:
    from pipelines.vlm.config import EvaluateSection

LLAVA_QUESTIONS = "pope/llava_pope_test.jsonl"
LABELS = "pope/coco/coco_pope_{category}.json"
IMAGES = "pope/val2014"
CATEGORIES = ("random", "popular", "adversarial")
ID_BASES = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""Added to POPE's question ids, which begin anew in each category, where LLaVA's file is not there."""
NEGATIONS = frozenset(("No", "not", "no"))


class POPE(QuestionEvaluator):
    """The three COCO categories of POPE; the reported number is the mean of their F1, with yes as the positive."""

    name = "vlm/pope"

    def read(self, root: Path, section: EvaluateSection) -> list[Row]:
        """Return the questions with their labels, matched by category, picture and wording, never by order."""
        purpose = f"{self.name} needs its questions and labels"
        paths = {each: need_file(root, [LABELS.format(category=each)], purpose) for each in CATEGORIES}
        labelled = {each: _labelled_rows(path, each) for each, path in paths.items()}
        asked = root / LLAVA_QUESTIONS
        if not asked.is_file():
            return [row for rows in labelled.values() for row in rows.values()]
        return _match(asked, labelled, paths)

    def select(self, rows: list[Row], limit: int) -> list[Row]:
        """Return as many questions of each category."""
        return select_evenly(rows, limit, lambda row: row["category"])

    def judge(self, row: Row, text: str) -> dict[str, Any]:
        """Return ``yes`` or ``no``: what ``parse_answer`` makes of the text."""
        pred = parse_answer(text)
        return {"pred": pred, "correct": pred == row["label"]}

    def score(self, predictions: list[Row]) -> list[Metric]:
        """Return the mean F1, then five metrics a category under ``vlm/pope-<category>``."""
        by_category = {
            f"{self.name}-{each}": [row for row in predictions if row["category"] == each] for each in CATEGORIES
        }
        metrics = [yes_no_metrics(name, rows) for name, rows in by_category.items() if rows]
        f1s = [category[0] for category in metrics]
        majority = sum(metric.extra["majority"] for metric in f1s) / len(f1s)
        mean = average_metric(self.name, f1s, extra={"majority": majority, "majority_answer": "yes"})
        return [mean, *(metric for category in metrics for metric in category)]


def parse_answer(text: str) -> str:
    """Return ``no`` if the text up to its first full stop has the word No, not or no, else ``yes``.

    As in LLaVA's script: words end at spaces, commas do not count, and "NO", "none" and "" are a yes.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if NEGATIONS.intersection(words) else "yes"


def yes_no_metrics(name: str, rows: list[Row]) -> list[Metric]:
    """Return F1, accuracy, precision, recall and the share of yes; a ratio of nothing to nothing is 0."""
    counts = Counter((row["pred"], row["label"]) for row in rows)
    hits, false_alarms, misses = counts["yes", "yes"], counts["yes", "no"], counts["no", "yes"]
    num_yes, num_positive, n = hits + false_alarms, hits + misses, len(rows)
    return [
        f1_metric(name, hits, false_alarms, misses, n),
        _share(name, "accuracy", hits + counts["no", "no"], n),
        _share(name, "precision", hits, num_yes),
        _share(name, "recall", hits, num_positive),
        replace(_share(name, "yes_ratio", num_yes, n), higher_is_better=False),
    ]


def f1_metric(name: str, hits: int, false_alarms: int, misses: int, n: int) -> Metric:
    """Return F1 of ``n`` rows with its standard error by the delta method, beside what always saying yes scores.

    With h hits and e errors (false alarms and misses), F1 = 2h / (2h + e). Their shares of n are multinomial, which
    gives it the variance 4 h e (h + e) / (2h + e)^4.
    """
    errors = false_alarms + misses
    total = 2 * hits + errors
    return Metric(
        name=name,
        metric="f1",
        value=2 * hits / total if total else 0.0,
        stderr=2 * math.sqrt(hits * errors * (hits + errors)) / total**2 if total else 0.0,
        n=n,
        extra={"majority": 2 * (hits + misses) / (n + hits + misses), "majority_answer": "yes"},
    )


def _share(name: str, metric: str, part: int, whole: int) -> Metric:
    value = part / whole if whole else 0.0
    stderr = math.sqrt(value * (1 - value) / whole) if whole else None
    return Metric(name=name, metric=metric, value=value, stderr=stderr, n=whole)


def _labelled_rows(path: Path, category: str) -> dict[int, Row]:
    rows = {}
    for line in read_lines(path, {"question_id": int, "image": str, "text": str, "label": str}):
        if line["label"] not in ("yes", "no") or line["question_id"] in rows:
            raise problem(
                f"{path}: question {line['question_id']} has the label {line['label']!r}; each id must occur once and "
                "be labelled yes or no. Download the file again."
            )
        rows[line["question_id"]] = {
            "question_id": ID_BASES[category] + line["question_id"],
            "prompt": f"{line['text']}\n{SHORT_ANSWER}",
            "image": f"{IMAGES}/{line['image']}",
            "category": category,
            "label": line["label"],
        }
    return rows


def _question(row: Row) -> tuple[str, str]:
    return row["image"], row["prompt"].partition("\n")[0]


def _match(asked: Path, labelled: dict[str, dict[int, Row]], paths: dict[str, Path]) -> list[Row]:
    """Return the rows that LLaVA's file ``asked`` asks, each with its label; there must be as many of both.

    LLaVA's file belongs to the labels of POPE's commit e3e39262.
    """
    ids: dict[str, list[int]] = {category: [] for category in labelled}
    by_question = {each: {_question(row): row for row in rows.values()} for each, rows in labelled.items()}
    rows = []
    for line in read_lines(asked, {"question_id": int, "image": str, "text": str, "category": str}):
        category, image = line["category"], f"{IMAGES}/{line['image']}"
        if category not in labelled:
            raise problem(f"{asked}: a question has the category {category!r}; use one of {', '.join(CATEGORIES)}.")
        own = look_up(by_question[category], _question({"image": image, "prompt": line["text"]}), paths[category])
        ids[category].append(line["question_id"])
        rows.append({**own, "question_id": line["question_id"], "prompt": line["text"]})
    for category, own_rows in labelled.items():
        num_asked, num_different = len(ids[category]), len(set(ids[category]))
        if not num_asked == num_different == len(own_rows):
            raise problem(
                f"{asked} asks {num_asked} {category} questions, {num_different} of them different, and "
                f"{paths[category]} has {len(own_rows)} labels; the numbers must be equal. Download both files again."
            )
    return rows


EVALUATORS.register(POPE.name)(POPE())
