"""Each epoch takes every row once, and a step's rows depend on the seed and the step alone."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_core.data.mixture import Mixture
from dora_core.data.sampler import StepPlan

splits = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))  # world size, micro-batch, accumulation


def plans(num_rows, split, seed, lengths=None, **more):
    world_size, micro, accumulation = split
    return [
        StepPlan(
            num_rows=num_rows,
            global_batch_size=world_size * micro * accumulation,
            micro_batch_size=micro,
            seed=seed,
            world_size=world_size,
            rank=rank,
            lengths=lengths,
            **more,
        )
        for rank in range(world_size)
    ]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 150), splits, st.integers(0, 3), st.integers(0, 2), st.booleans())
def test_every_row_is_taken_exactly_once_per_epoch(num_rows, split, seed, epoch, grouped):
    lengths = [(7 * row) % 31 for row in range(num_rows)] if grouped else None
    ranks = plans(num_rows, split, seed, lengths)
    steps = range(epoch * ranks[0].steps_per_epoch, (epoch + 1) * ranks[0].steps_per_epoch)
    taken = []
    for step in steps:
        dealt = [plan.micro_batches(step) for plan in ranks]
        assert all(len(batches) == split[2] for batches in dealt)
        assert all(len(batch) <= split[1] for batches in dealt for batch in batches)
        totals = [sum(map(len, batches)) for batches in dealt]
        assert max(totals) - min(totals) <= 1
        here = [row for batches in dealt for batch in batches for row in batch]
        assert len(here) == ranks[0].global_batch_size or step == steps[-1]
        assert sorted(here) == sorted(ranks[0].rows(step))
        taken += here
    assert sorted(taken) == list(range(num_rows))


@pytest.mark.parametrize("grouped", [False, True])
def test_a_steps_rows_are_the_same_whatever_the_split(grouped):
    lengths = [(13 * row) % 41 for row in range(101)] if grouped else None
    seen = set()
    for split in ((1, 12, 1), (1, 1, 12), (2, 3, 2), (3, 4, 1), (12, 1, 1), (4, 1, 3)):
        ranks = plans(101, split, 5, lengths)
        steps = [
            frozenset(row for plan in ranks for batch in plan.micro_batches(step) for row in batch)
            for step in range(3 * ranks[0].steps_per_epoch)
        ]
        seen.add(tuple(steps))
    assert len(seen) == 1


def test_a_plan_asked_from_step_k_gives_the_tail():
    (plan,) = plans(37, (1, 4, 2), 0)
    whole = [plan.micro_batches(step) for step in range(25)]
    (fresh,) = plans(37, (1, 4, 2), 0)
    assert [fresh.micro_batches(step) for step in range(11, 25)] == whole[11:]
    assert [fresh.micro_batches(step) for step in reversed(range(25))] == whole[::-1]


def test_epochs_and_seeds_differ_in_order():
    (plan,) = plans(64, (1, 64, 1), 0)
    (other,) = plans(64, (1, 64, 1), 1)
    assert plan.rows(0) != plan.rows(1)
    assert plan.rows(0) != other.rows(0)


def test_the_short_end_of_an_epoch_has_empty_lists():
    ranks = plans(9, (4, 1, 2), 0)
    assert [plan.micro_batches(1) for plan in ranks[1:]] == [[[], []]] * 3
    assert [len(batch) for batch in ranks[0].micro_batches(1)] == [1, 0]


def test_grouping_by_length_saves_padding_and_puts_the_longest_row_first():
    lengths = [1 + (97 * row) % 256 for row in range(2011)]

    def padded(plan):
        steps = [plan.rows(step) for step in range(plan.steps_per_epoch)]
        return sum(max(lengths[row] for row in rows) * len(rows) for rows in steps)

    (mixed,) = plans(len(lengths), (1, 16, 1), 0)
    (grouped,) = plans(len(lengths), (1, 16, 1), 0, lengths)
    assert padded(grouped) < 1.05 * sum(lengths) < 1.7 * sum(lengths) < padded(mixed)
    for epoch in range(3):
        first = grouped.rows(epoch * grouped.steps_per_epoch)
        assert max(lengths[row] for row in first) == max(lengths)
    means = [sum(lengths[row] for row in grouped.rows(step)) for step in range(1, 60)]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_the_number_of_steps_follows_from_epochs_unless_given():
    (plan,) = plans(301, (1, 10, 1), 0)
    assert plan.steps_per_epoch == 31
    assert plan.num_steps(3) == 93
    assert plan.num_steps(0.5) == 16
    assert plan.num_steps(3, max_steps=7) == 7
    (tenth,) = plans(30, (1, 1, 1), 0)
    assert tenth.num_steps(0.1) == 3


def test_a_batch_size_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="multiple of micro_batch_size x world_size"):
        StepPlan(num_rows=10, global_batch_size=10, micro_batch_size=4, seed=0)
    with pytest.raises(ValueError, match="num_rows is 0"):
        StepPlan(num_rows=0, global_batch_size=4, micro_batch_size=4, seed=0)
    with pytest.raises(ValueError, match="number of rows"):
        StepPlan(num_rows=3, global_batch_size=4, micro_batch_size=4, seed=0, lengths=[1])


def steps_of(plan, epoch=0):
    return [plan.rows(step) for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)]


def test_the_order_without_groups_and_mixture_is_the_one_recorded():
    lengths = [1 + (13 * row) % 41 for row in range(1001)]
    for by_length, digest in ((None, "c632efa503abb6aa"), (lengths, "43997d1fa44bcd50")):
        (plan,) = plans(1001, (1, 4, 4), 7, by_length)
        rows = [steps_of(plan, epoch) for epoch in range(3)]
        assert hashlib.sha256(str(rows).encode()).hexdigest()[:16] == digest


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2), st.booleans())
def test_steps_are_of_one_group_but_for_what_is_left_of_each(num_rows, batch, num_groups, epoch, with_lengths):
    groups = [(row * row // 7) % num_groups for row in range(num_rows)]
    lengths = [1 + (13 * row) % 41 for row in range(num_rows)] if with_lengths else None
    (plan,) = plans(num_rows, (1, batch, 1), 0, lengths, groups=groups)
    steps = steps_of(plan, epoch)
    assert sorted(row for rows in steps for row in rows) == list(range(num_rows))
    assert all(len(rows) == batch for rows in steps[:-1])
    pure = Counter(groups[rows[0]] for rows in steps if len(rows) == batch and len({groups[row] for row in rows}) == 1)
    fullest = {group: count // batch for group, count in Counter(groups).items()}
    too_small = with_lengths and 0 in fullest.values()  # one batch may have had to take in the longest row
    assert sum(fullest.values()) - sum(pure.values()) <= (1 if too_small else 0)
    if with_lengths and num_rows >= batch:
        assert max(lengths[row] for row in steps[0]) == max(lengths)


def test_a_longest_row_of_a_group_without_a_batch_of_its_own_still_comes_first():
    lengths = [10] * 30 + [99, 98]
    (plan,) = plans(32, (1, 5, 1), 0, lengths, groups=[0] * 30 + [1] * 2)
    steps = steps_of(plan)
    assert 30 in steps[0] and sorted(row for rows in steps for row in rows) == list(range(32))
    assert len(steps[-1]) == 2


def test_groups_are_shuffled_among_each_other_and_within():
    groups = [row % 2 for row in range(400)]
    (plan,) = plans(400, (1, 4, 1), 0, groups=groups)
    first, second = steps_of(plan, 0), steps_of(plan, 1)
    assert {frozenset(rows) for rows in first}.isdisjoint({frozenset(rows) for rows in second})
    order = [groups[rows[0]] for rows in first]
    assert order != sorted(order) and order[: len(order) // 2].count(0) in range(15, 36)


def test_groups_keep_similar_lengths_together():
    lengths = [1 + (97 * row) % 256 + 300 * (row % 2) for row in range(3000)]
    (plan,) = plans(3000, (1, 16, 1), 0, lengths, groups=[row % 2 for row in range(3000)])
    padded = sum(max(lengths[row] for row in rows) * len(rows) for rows in steps_of(plan))
    assert padded < 1.03 * sum(lengths)


def test_one_group_for_all_rows_changes_nothing_when_lengths_are_given():
    lengths = [(13 * row) % 41 for row in range(101)]
    (without,), (with_group,) = plans(101, (1, 6, 1), 3, lengths), plans(101, (1, 6, 1), 3, lengths, groups=[5] * 101)
    assert [steps_of(without, epoch) for epoch in range(3)] == [steps_of(with_group, epoch) for epoch in range(3)]


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("with_groups", [False, True])
def test_an_epoch_of_a_mixture_takes_its_rows_in_shuffled_order(with_lengths, with_groups):
    mixture = Mixture([30, 50, 9], [1.0, 0.3, 2.0], seed=3)
    options = {"lengths": [5 + (7 * row) % 23 for row in range(89)]} if with_lengths else {}
    if with_groups:
        options["groups"] = [int(row >= 30) for row in range(89)]
    (plan,) = plans(89, (1, 4, 1), 3, mixture=mixture, **options)
    assert plan.num_rows == 89 and plan.steps_per_epoch == 16  # of 30 + 15 + 18 rows
    for epoch in range(4):
        taken = [row for rows in steps_of(plan, epoch) for row in rows]
        assert Counter(taken) == Counter(mixture.epoch(epoch).tolist())
        assert taken != mixture.epoch(epoch).tolist()


def test_a_mixture_of_everything_once_is_an_epoch_like_any_other():
    (plan,) = plans(37, (1, 4, 2), 0, mixture=Mixture([20, 17], [1, 1], seed=0))
    whole = [plan.micro_batches(step) for step in range(25)]
    assert sorted(row for step in whole[:5] for rows in step for row in rows) == list(range(37))
    (fresh,) = plans(37, (1, 4, 2), 0, mixture=Mixture([20, 17], [1, 1], seed=0))
    assert [fresh.micro_batches(step) for step in range(11, 25)] == whole[11:]


def test_groups_and_mixture_must_be_of_the_plans_rows():
    with pytest.raises(ValueError, match=r"len\(groups\) is 2; it must be the number of rows \(3\)"):
        plans(3, (1, 2, 1), 0, groups=[0, 1])
    with pytest.raises(ValueError, match=r"num_rows is 3; it must be the mixture's \(4\)"):
        plans(3, (1, 2, 1), 0, mixture=Mixture([2, 2], [1, 1], seed=0))
