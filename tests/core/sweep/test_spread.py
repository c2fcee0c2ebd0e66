"""Means, deviations and intervals against numbers worked out by hand and printed in tables."""

from __future__ import annotations

import math

import pytest

from dora_core.evaluation.results import accuracy_metric, average_metric, write_results
from dora_core.sweep.spread import difference_over_questions, difference_over_seeds, spread, t_quantile


@pytest.mark.parametrize(
    ("degrees", "printed"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_the_t_quantile_is_that_of_printed_tables(degrees, printed):
    assert t_quantile(degrees) == pytest.approx(printed, abs=5e-4)


def test_a_spread_divides_by_n_minus_one():
    found = spread([0.5, 0.7, 0.9])
    assert (found.n, found.min, found.max) == (3, 0.5, 0.9)
    assert (found.mean, found.sd) == (pytest.approx(0.7), pytest.approx(0.2))
    assert spread([0.5]).sd is None


def test_the_interval_over_seeds_is_students():
    found = difference_over_seeds([0.1, 0.2, 0.3])
    assert found.mean == pytest.approx(0.2) and found.n == 3
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(0.2 - half, abs=1e-6), pytest.approx(0.2 + half, abs=1e-6))
    assert found.interval == "t, over 3 seeds"


def results(folder, rows_hash="", value=None, **correct):
    """Write the results of one run, whose outcomes by benchmark are ``correct``; return what is compared."""
    from dataclasses import replace

    parts = [replace(accuracy_metric(f"llm/{task}", rows), dataset_hash=rows_hash) for task, rows in correct.items()]
    average = average_metric("llm/average", parts)
    average = average if value is None else replace(average, value=value)
    rows = [{"task": f"llm/{task}", "correct": bool(row)} for task, listed in correct.items() for row in listed]
    write_results(folder, [*parts, average], rows)
    return average, folder


def test_one_seed_has_an_interval_over_the_questions(tmp_path):
    before = results(tmp_path / "before", a=[1, 0, 0, 0], b=[0, 1])
    after = results(tmp_path / "after", a=[1, 1, 1, 0], b=[1, 1])
    found = difference_over_questions(before, after)
    # a: 0, 1, 1, 0 with variance 1/3 over 4 questions; b: 1, 0 with variance 1/2 over 2.
    half = 1.959964 * math.sqrt((1 / 3) / 4 + (1 / 2) / 2) / 2
    assert found.mean == pytest.approx(0.5)
    assert (found.low, found.high) == (pytest.approx(0.5 - half, abs=1e-6), pytest.approx(0.5 + half, abs=1e-6))
    assert found.interval == "normal, over 6 questions; one seed"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rows_hash": "other"}, "none: the runs were scored on different rows"),
        ({"value": 0.9}, "none: one seed, and the metric is no mean over questions"),
    ],
)
def test_no_interval_is_made_up(tmp_path, changes, why):
    before = results(tmp_path / "before", a=[1, 0, 0, 0])
    after = results(tmp_path / "after", a=[1, 1, 1, 0], **changes)
    found = difference_over_questions(before, after)
    assert (found.low, found.high, found.interval) == (None, None, why)


def test_a_single_question_has_no_interval(tmp_path):
    found = difference_over_questions(results(tmp_path / "before", a=[0]), results(tmp_path / "after", a=[1]))
    assert (found.mean, found.low) == (1.0, None) and "one question" in found.interval
