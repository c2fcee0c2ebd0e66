"""The statistics against exact values, and how often they raise a false alarm."""

from __future__ import annotations

import math
import random
from itertools import product

import numpy as np
import pytest

from dora_core.nightly.verdict import (
    FAMILY_LEVEL,
    Limits,
    compare,
    decide,
    holm,
    mcnemar,
    paired_bootstrap,
)


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (1, 0), (8, 0), (5, 3), (3, 5), (12, 4), (400, 350)])
def test_mcnemar_is_the_binomial_tail(worse, better):
    total = worse + better
    expected = sum(math.comb(total, count) for count in range(worse, total + 1)) / 2**total
    assert mcnemar(worse, better) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_agrees_with_counting_all_signs():
    for worse, better in [(3, 1), (4, 2), (2, 5)]:
        signs = list(product((0, 1), repeat=worse + better))
        assert mcnemar(worse, better) == sum(sum(sign) >= worse for sign in signs) / len(signs)


def test_mcnemar_of_many_discordant_examples_does_not_overflow():
    assert 0 < mcnemar(3000, 2500) < 1e-9
    assert mcnemar(10_000, 10_000) == pytest.approx(0.5, abs=0.01)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_the_bootstrap_repeats_and_agrees_with_the_normal_distribution():
    differences = np.random.default_rng(1).normal(0.1, 1.0, 400)
    p = paired_bootstrap(differences)
    assert p == paired_bootstrap(differences)
    z = differences.mean() / (differences.std() / 20)
    assert p == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)), rel=0.1)


def test_the_bootstrap_has_its_level_when_nothing_changed():
    generator = np.random.default_rng(2)
    num = 1000
    low = sum(paired_bootstrap(generator.normal(size=60), num_resamples=400) <= 0.05 for _ in range(num))
    assert abs(low / num - 0.05) < 3 * math.sqrt(0.05 * 0.95 / num)


def test_equal_outcomes_are_no_change():
    assert mcnemar(0, 0) == 1.0
    assert paired_bootstrap([0.0] * 50) == 1.0


def night(generator: random.Random, change: float, flip: float = 0.1) -> list[float]:
    """One-sided p-values of eight tasks of 40 questions; a share flips, and ``change`` go from right to wrong."""
    found = []
    for _ in range(8):
        worse = better = 0
        for _ in range(40):
            if generator.random() < flip:
                worse, better = (worse + 1, better) if generator.random() < 0.5 else (worse, better + 1)
            elif generator.random() < change:
                worse += 1
        found.append(mcnemar(worse, better))
    return holm(found)


def test_a_night_in_which_nothing_changed_is_red_no_more_often_than_stated():
    generator = random.Random(3)
    num = 4000
    red = sum(min(night(generator, 0.0)) <= FAMILY_LEVEL for _ in range(num))
    assert red / num <= FAMILY_LEVEL + 3 * math.sqrt(FAMILY_LEVEL * (1 - FAMILY_LEVEL) / num)


def test_a_night_in_which_every_second_answer_was_lost_is_red():
    generator = random.Random(4)
    assert all(min(night(generator, 0.5)) <= FAMILY_LEVEL for _ in range(200))


def verdict(value, *, limits=Limits(), references=(10.0,), stderr=None, higher=True, pairs=()):  # noqa: B008
    comparison = compare(value, stderr, higher, references, [stderr] * len(references), limits, pairs)
    return decide(comparison, comparison.p_worse, comparison.p_better)[0]


def test_outside_the_band_a_worsening_is_red_and_an_improvement_yellow():
    limits = Limits(relative_floor=0.2)
    assert [verdict(value, limits=limits) for value in (7.9, 8.1, 10.0, 11.9, 12.1)] == [
        "red", "green", "green", "green", "yellow",
    ]  # fmt: skip
    assert [verdict(value, limits=limits, higher=False) for value in (7.9, 12.1)] == ["yellow", "red"]


def test_the_band_is_the_larger_of_floor_and_standard_errors():
    assert verdict(9.0, limits=Limits(floor=0.5, k=4.0), stderr=0.3) == "green"
    assert verdict(9.0, limits=Limits(floor=0.5, k=4.0), stderr=0.2) == "red"
    assert verdict(9.4, limits=Limits(floor=0.7, k=4.0), stderr=0.1) == "green"


def test_the_spread_between_nights_is_a_standard_error():
    steady, shaky = [10.0, 10.01, 9.99, 10.0], [9.0, 11.0, 10.0, 10.5]
    assert verdict(8.0, references=steady) == "red"
    assert verdict(8.0, references=shaky) == "green"


def test_a_pin_takes_the_place_of_recent_nights_so_that_small_steps_do_not_add_up():
    drifting = [10.0 - 0.1 * night for night in range(30)]
    assert verdict(6.9, limits=Limits(floor=0.7, k=0.0), references=drifting) == "green"
    assert verdict(6.9, limits=Limits(floor=0.7, k=0.0, expected=10.0), references=drifting) == "red"


def test_a_pin_is_watched_where_examples_are_paired_too():
    same = [(1.0, 1.0)] * 10 + [(0.0, 0.0)] * 30
    assert verdict(0.25, references=[0.25], pairs=same) == "green"
    assert verdict(0.25, references=[0.25], pairs=same, limits=Limits(expected=0.6, floor=0.05)) == "red"


def test_paired_outcomes_decide_where_they_exist():
    lost = [(1.0, 0.0)] * 10 + [(1.0, 1.0)] * 30
    assert verdict(0.75, references=[1.0], pairs=lost) == "red"
    assert verdict(0.75, references=[1.0], pairs=lost, limits=Limits(floor=0.3)) == "green"
    won = [(now, before) for before, now in lost]
    assert verdict(1.0, references=[0.75], pairs=won) == "yellow"
    graded = [(0.8, 0.8 - 0.01 * (place % 5)) for place in range(60)]
    comparison = compare(0.78, None, True, [0.8], [None], Limits(), graded)
    assert comparison.test == "bootstrap" and decide(comparison, comparison.p_worse, comparison.p_better)[0] == "red"


def test_without_history_all_is_green_and_what_is_not_finite_is_red():
    assert verdict(3.0, references=()) == "green"
    assert verdict(math.inf, references=()) == "red"
    assert verdict(math.inf) == "red"
