from __future__ import annotations

from collections import Counter

import pytest

from pipelines.video.plan import TaskPlan

SIZES, BATCHES = [10, 25, 4], [4, 8, 2]


def plan(**changes) -> TaskPlan:
    return TaskPlan(SIZES, BATCHES, **{"accumulation": 1, "seed": 3} | changes)


def test_every_row_of_every_task_comes_once_an_epoch_in_batches_of_its_tasks_size():
    taken = plan()
    assert taken.steps_per_epoch == 3 + 4 + 2 and taken.num_rows == 39
    for epoch in range(3):
        draws = [taken.rows(epoch * 9 + step) for step in range(9)]
        assert sorted(draw for draws_of_step in draws for draw in draws_of_step) == list(
            range(epoch * 39, (epoch + 1) * 39)
        )
        sizes = [(taken.task(epoch * 9 + step), len(own)) for step, own in enumerate(draws)]
        assert Counter(sizes) == {(0, 4): 2, (0, 2): 1, (1, 8): 3, (1, 1): 1, (2, 2): 2}
        for step, own in enumerate(draws):
            start = [0, 10, 35][taken.task(epoch * 9 + step)]
            assert all(start <= draw - epoch * 39 < start + SIZES[taken.task(epoch * 9 + step)] for draw in own)


def test_tasks_and_rows_come_in_another_order_in_each_epoch_and_for_each_seed():
    orders = [[plan(seed=seed).task(epoch * 9 + step) for step in range(9)] for seed in (3, 4) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert [plan().rows(step) for step in range(18)] == [plan().rows(step) for step in range(18)]
    first, second = ([row % 39 for step in range(9) for row in plan().rows(9 * epoch + step)] for epoch in (0, 1))
    assert first != second


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 3), (2, 1), (3, 2)])
def test_ranks_and_micro_batches_share_a_step_and_a_short_batch_leaves_some_empty(world_size, accumulation):
    whole = plan()
    parts = [plan(world_size=world_size, rank=rank, accumulation=accumulation) for rank in range(world_size)]
    for step in range(18):
        dealt = [part.micro_batches(step) for part in parts]
        assert all(len(own) == accumulation for own in dealt)
        assert sorted(draw for own in dealt for batch in own for draw in batch) == sorted(whole.rows(step))
        assert len({part.task(step) for part in parts}) == 1


def test_epochs_become_steps():
    assert plan().num_steps(2.5) == 23 and plan().num_steps(2.5, 7) == 7
