from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_core.registry import EVALUATORS
from pipelines.vlm.evaluators.pope import CATEGORIES, f1_metric, parse_answer, yes_no_metrics

POPE = EVALUATORS.get("vlm/pope")
SHORT = "\nAnswer the question using a single word or phrase."
BASES = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
OBJECTS = ("dog", "cat", "car", "cup")


def settings(root: Path, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"path": str(root), "limit": None, **changes})


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def labelled(category: str) -> list[dict[str, Any]]:
    """Return the four questions of a category; those of an even id are of objects that are there."""
    return [
        {
            "question_id": number,
            "image": f"{category}{number}.jpg",
            "text": f"Is there a {thing} in the image?",
            "label": "no" if number % 2 else "yes",
        }
        for number, thing in enumerate(OBJECTS, 1)
    ]


def asked() -> list[dict[str, Any]]:
    """Return LLaVA's rows, in its order of categories and with its ids."""
    return [
        {
            "question_id": BASES[category] + row["question_id"],
            "image": row["image"],
            "text": row["text"] + SHORT,
            "category": category,
        }
        for category in ("adversarial", "random", "popular")
        for row in labelled(category)
    ]


def write_pope(root: Path, llava_rows: Sequence[dict[str, Any]] | None) -> None:
    for category in CATEGORIES:
        write_lines(root / f"pope/coco/coco_pope_{category}.json", labelled(category))
        for row in labelled(category):
            (root / "pope/val2014").mkdir(exist_ok=True)
            (root / "pope/val2014" / row["image"]).write_bytes(b"")
    if llava_rows is not None:
        write_lines(root / "pope/llava_pope_test.jsonl", llava_rows)


def scores(rows: list[dict[str, Any]], truthful: bool = True) -> dict[tuple[str, str], float]:
    """Score answers that are right, but for the first two questions of the category adversarial."""
    predictions = []
    for row in rows:
        wrong = row["category"] == "adversarial" and row["question_id"] <= 2 and not truthful
        says_yes = (row["label"] == "yes") != wrong
        predictions.append(POPE.prediction(row, "Yes" if says_yes else "No"))
    return {(metric.name, metric.metric): metric.value for metric in POPE.score(predictions)}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("No", "no"),
        ("no", "no"),
        ("No, there is none", "no"),
        ("There is not", "no"),
        ("No. Yes", "no"),
        ("Yes. No", "yes"),
        ("NO", "yes"),
        ("None", "yes"),
        ("Not really", "yes"),
        ("", "yes"),
        ("no\n", "yes"),
        ("Yes", "yes"),
    ],
)
def test_an_answer_is_read_as_in_llavas_script(text: str, answer: str) -> None:
    assert parse_answer(text) == answer


def test_llavas_questions_get_their_labels_and_keep_their_ids(tmp_path: Path) -> None:
    write_pope(tmp_path, asked())
    rows = POPE.load(settings(tmp_path))
    assert rows[4] == {
        "question_id": 10_000_001,
        "prompt": "Is there a dog in the image?" + SHORT,
        "image": "pope/val2014/random1.jpg",
        "category": "random",
        "label": "no",
    }
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in asked()]


def test_without_llavas_file_the_same_questions_are_asked(tmp_path: Path) -> None:
    write_pope(tmp_path, asked())
    with_file = POPE.load(settings(tmp_path))
    (tmp_path / "pope/llava_pope_test.jsonl").unlink()
    without = POPE.load(settings(tmp_path))
    assert [row["category"] for row in without[::4]] == ["random", "popular", "adversarial"]
    assert sorted(without, key=str) == sorted(with_file, key=str)


def test_a_shuffled_question_file_scores_the_same(tmp_path: Path) -> None:
    write_pope(tmp_path, asked())
    in_order = scores(POPE.load(settings(tmp_path)), truthful=False)
    shuffled = asked()
    random.Random(0).shuffle(shuffled)
    write_lines(tmp_path / "pope/llava_pope_test.jsonl", shuffled)
    assert scores(POPE.load(settings(tmp_path)), truthful=False) == in_order
    assert in_order["vlm/pope", "f1"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert in_order["vlm/pope-random", "f1"] == 1.0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (asked()[1:], r"asks 3 adversarial questions, 3 of them different, and .* has 4 labels; .* must be equal"),
        ([*asked(), asked()[0]], r"asks 5 adversarial questions, 4 of them different"),
        ([{**asked()[0], "text": "Is it?"}], r"adversarial\.json has nothing for the question \('pope.*'Is it\?'\)"),
        ([{**asked()[0], "image": "x.jpg"}], r"has nothing for the question \('pope/val2014/x\.jpg'"),
        ([{**asked()[0], "category": "easy"}], r"has the category 'easy'; use one of random, popular, adversarial"),
    ],
)
def test_questions_that_do_not_fit_the_labels_are_refused(
    rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    write_pope(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        POPE.load(settings(tmp_path))


@pytest.mark.parametrize("change", [{"label": "maybe"}, {"question_id": 2}])
def test_labels_must_be_yes_or_no_and_each_id_occur_once(change: dict[str, Any], tmp_path: Path) -> None:
    write_pope(tmp_path, None)
    first, *others = labelled("popular")
    write_lines(tmp_path / "pope/coco/coco_pope_popular.json", [{**first, **change}, *others])
    with pytest.raises(ValueError, match=r"popular\.json: question 2|popular\.json: question 1 has the label 'maybe'"):
        POPE.load(settings(tmp_path))


def test_all_three_categories_are_needed(tmp_path: Path) -> None:
    write_pope(tmp_path, asked())
    (tmp_path / "pope/coco/coco_pope_popular.json").unlink()
    with pytest.raises(ValueError, match=r"vlm/pope needs .*has no pope/coco/coco_pope_popular\.json"):
        POPE.load(settings(tmp_path))


def test_the_limit_is_shared_by_the_categories(tmp_path: Path) -> None:
    write_pope(tmp_path, asked())
    rows = POPE.load(settings(tmp_path, limit=6))
    assert [row["question_id"] for row in rows] == [1, 2, 10_000_001, 10_000_002, 20_000_001, 20_000_002]


def rows_of(hits: int, false_alarms: int, misses: int, correct_rejections: int) -> list[dict[str, Any]]:
    pairs = [("yes", "yes")] * hits + [("yes", "no")] * false_alarms
    pairs += [("no", "yes")] * misses + [("no", "no")] * correct_rejections
    return [{"pred": pred, "label": label} for pred, label in pairs]


def test_five_numbers_describe_a_category() -> None:
    metrics = {metric.metric: metric for metric in yes_no_metrics("vlm/pope-random", rows_of(3, 1, 2, 4))}
    values = {name: metric.value for name, metric in metrics.items()}
    assert values == pytest.approx({"f1": 6 / 9, "accuracy": 0.7, "precision": 0.75, "recall": 0.6, "yes_ratio": 0.4})
    assert [metrics[name].n for name in values] == [10, 10, 4, 5, 10]
    assert metrics["accuracy"].stderr == pytest.approx(math.sqrt(0.7 * 0.3 / 10))
    assert metrics["f1"].extra == {"majority": 10 / 15, "majority_answer": "yes"}


@pytest.mark.parametrize("counts", [(0, 0, 5, 5), (0, 0, 0, 5), (0, 5, 0, 0)])
def test_a_ratio_of_nothing_is_zero(counts: tuple[int, int, int, int]) -> None:
    values = {metric.metric: metric.value for metric in yes_no_metrics("vlm/pope-random", rows_of(*counts))}
    assert values["f1"] == values["precision"] == values["recall"] == 0.0


def test_the_standard_error_of_f1_is_the_spread_of_repeated_draws() -> None:
    shares, n, num_draws = (0.35, 0.1, 0.15, 0.4), 300, 2000
    metric = f1_metric("f1", *(round(share * n) for share in shares[:3]), n)
    generator = random.Random(0)
    drawn = []
    for _ in range(num_draws):
        outcomes = generator.choices(range(4), shares, k=n)
        drawn.append(f1_metric("f1", *(outcomes.count(kind) for kind in range(3)), n).value)
    mean = sum(drawn) / num_draws
    spread = math.sqrt(sum((value - mean) ** 2 for value in drawn) / num_draws)
    assert metric.stderr == pytest.approx(spread, rel=0.06)


def test_the_mean_of_the_categories_comes_first_with_the_error_of_a_mean() -> None:
    counts = {"random": (4, 0, 0, 4), "popular": (3, 1, 1, 3), "adversarial": (2, 2, 2, 2)}
    rows = [{**row, "category": category} for category, each in counts.items() for row in rows_of(*each)]
    metrics = POPE.score(rows)
    f1s = [metric for metric in metrics[1:] if metric.metric == "f1"]
    assert [metric.name for metric in f1s] == ["vlm/pope-random", "vlm/pope-popular", "vlm/pope-adversarial"]
    assert [metric.value for metric in f1s] == pytest.approx([1.0, 0.75, 0.5])
    assert (metrics[0].name, metrics[0].metric, metrics[0].n) == ("vlm/pope", "f1", 24)
    assert metrics[0].value == pytest.approx(0.75)
    assert metrics[0].stderr == pytest.approx(math.sqrt(sum(metric.stderr**2 for metric in f1s)) / 3)
    assert metrics[0].extra["majority"] == pytest.approx(8 / 12)
    assert len(metrics) == 16
