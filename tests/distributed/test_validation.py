"""Sums over rows that are not trained on: the same on any number of ranks, with as many calls on each."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from dora_core.data.collate import Batch
from dora_core.engine.distributed import World
from dora_core.testing.ranks import run_on_ranks
from dora_core.training.validation import sum_over_rows


def collate(rows: list[int]) -> Batch:
    return {"values": torch.tensor(rows, dtype=torch.float64)}


def sums_and_calls(world: World, num_rows: int) -> tuple[list[float], int]:
    calls = []

    def measure(batch: Batch) -> tuple[torch.Tensor, int]:
        calls.append(batch)
        return batch["values"].sum(), len(batch["values"])

    engine = SimpleNamespace(world=world, evaluating=nullcontext)
    return sum_over_rows(engine, range(num_rows), collate, measure, 2), len(calls)


@pytest.mark.parametrize(("num_rows", "num_calls"), [(0, 1), (1, 1), (5, 2), (8, 2)])
def test_ranks_share_the_rows_and_make_equally_many_calls(num_rows, num_calls):
    expected = [sum(range(num_rows)), num_rows]
    answers = run_on_ranks(sums_and_calls, 2, num_rows)
    assert answers == [(expected, num_calls)] * 2
    assert run_on_ranks(sums_and_calls, 1, num_rows)[0][0] == expected
