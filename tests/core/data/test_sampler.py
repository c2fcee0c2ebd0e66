"""Each epoch takes every row once, and a step's rows depend on the seed and the step alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_core.data.sampler import StepPlan

splits = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))  # world size, micro-batch, accumulation


def plans(num_rows, split, seed, lengths=None):
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
