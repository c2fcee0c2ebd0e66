"""The loader delivers the plan's batches, with any number of workers and from any step."""

from __future__ import annotations

import functools

import pytest
import torch

from dora_core.data.collate import TokenRow, make_packs, num_targets, pad_packs, pad_rows
from dora_core.data.loader import StepLoader
from dora_core.data.sampler import StepPlan

ROWS = [TokenRow([number + 1] * (number % 7 + 2), [number + 1] * (number % 7 + 2)) for number in range(21)]
PAD = functools.partial(pad_rows, pad_id=0)


def plan(world_size=2, rank=0):
    return StepPlan(
        num_rows=len(ROWS), global_batch_size=8, micro_batch_size=2, seed=3, world_size=world_size, rank=rank
    )


def collect(**arguments):
    return [
        [{name: tensor.tolist() for name, tensor in batch.items()} for batch in step]
        for step in StepLoader(plan(), ROWS, arguments.pop("collate", PAD), **arguments)
    ]


def test_a_step_is_the_collated_rows_of_the_plan():
    steps = collect(end_step=6)
    assert len(steps) == 6
    for step, batches in enumerate(steps):
        expected = [PAD([ROWS[row] for row in rows]) for rows in plan().micro_batches(step)]
        assert batches == [{name: tensor.tolist() for name, tensor in batch.items()} for batch in expected]


def pad_packs_of_rows(rows, pad_id):
    return pad_packs(make_packs(rows, 16), pad_id)


def test_workers_give_the_same_batches_in_the_same_order():
    pack = functools.partial(pad_packs_of_rows, pad_id=0)
    assert collect(end_step=5, num_workers=2, collate=pack) == collect(end_step=5, collate=pack)


def test_resuming_at_step_k_gives_the_tail():
    assert collect(start_step=4, end_step=9) == collect(end_step=9)[4:]
    assert collect(start_step=9, end_step=9) == []


def test_an_epoch_loses_no_target_and_every_rank_gets_equally_many_batches():
    targets = 0
    for rank in range(4):
        steps = list(StepLoader(plan(4, rank), ROWS, PAD, end_step=plan().steps_per_epoch))
        assert [len(step) for step in steps] == [1, 1, 1]
        targets += sum(num_targets(batch) for step in steps for batch in step)
    assert targets == sum(len(row.labels) - 1 for row in ROWS)


def test_iterating_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    collect(end_step=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_must_be_those_of_the_plan():
    with pytest.raises(ValueError, match="len\\(rows\\) is 20"):
        StepLoader(plan(), ROWS[1:], PAD, end_step=1)
    with pytest.raises(ValueError, match="start_step is 2"):
        StepLoader(plan(), ROWS, PAD, start_step=2, end_step=1)
