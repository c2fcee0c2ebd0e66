from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from dora_core.config import TrainSection
from dora_core.engine.optim import LossScale, lr_factor, make_optimizer, num_warmup_steps, set_learning_rates


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.full((2, 2), 2.0))]


def factors(num_steps: int, **values) -> list[float]:
    train = TrainSection(lr=1.0, **values)
    return [lr_factor(train, step, num_steps) for step in range(num_steps)]


def test_the_linear_schedule_rises_from_zero_and_falls_to_zero_after_the_last_step():
    assert factors(10, schedule="linear", warmup_steps=2) == [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert lr_factor(TrainSection(lr=1.0, warmup_steps=2), 10, 10) == 0


def test_the_cosine_schedule_is_half_a_wave():
    expected = [0, 1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)]
    assert factors(5, schedule="cosine", warmup_steps=1) == pytest.approx(expected, abs=1e-15)


def test_the_constant_schedule_stays_after_the_warm_up():
    assert factors(6, schedule="constant", warmup_steps=4) == [0, 0.25, 0.5, 0.75, 1, 1]
    assert factors(3, schedule="constant") == [1, 1, 1]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_without_warm_up_the_first_step_has_the_whole_rate_and_the_last_step_still_some(schedule):
    values = factors(7, schedule=schedule)
    assert values[0] == 1 and values[-1] > 0 and values == sorted(values, reverse=True)
    assert lr_factor(TrainSection(lr=1.0, schedule=schedule), 9, 7) == 0


@pytest.mark.parametrize(
    ("ratio", "num_steps", "warmup"), [(0.1, 100, 10), (0.03, 100, 3), (0.1, 101, 11), (0.0, 50, 0), (0.5, 1, 1)]
)
def test_a_warm_up_ratio_is_rounded_up_to_steps(ratio, num_steps, warmup):
    assert num_warmup_steps(TrainSection(lr=1.0, warmup_ratio=ratio), num_steps) == warmup
    by_steps = factors(num_steps, warmup_steps=warmup)
    assert factors(num_steps, warmup_ratio=ratio) == by_steps


def test_a_run_shorter_than_its_warm_up_only_rises():
    assert factors(3, warmup_steps=10) == [0, 0.1, 0.2]


@pytest.mark.parametrize(("warmup", "num_steps"), [(0, 1), (0, 23), (5, 23), (23, 23), (30, 23)])
@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        ("linear", lambda optimizer, warmup, total: get_linear_schedule_with_warmup(optimizer, warmup, total)),
        ("cosine", lambda optimizer, warmup, total: get_cosine_schedule_with_warmup(optimizer, warmup, total)),
        ("constant", lambda optimizer, warmup, total: get_constant_schedule_with_warmup(optimizer, warmup)),
    ],
)
def test_schedules_equal_those_of_transformers_step_by_step(schedule, make, warmup, num_steps):
    optimizer = torch.optim.SGD(weights(), lr=1.0)
    scheduler = make(optimizer, warmup, num_steps)
    theirs = []
    for _ in range(num_steps):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert factors(num_steps, schedule=schedule, warmup_steps=warmup) == pytest.approx(theirs, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "fused", "foreach"),
    [("adamw", True, None), ("adamw_foreach", None, True), ("adamw_loop", None, False)],
)
def test_adamw_has_the_implementation_and_the_numbers_of_the_recipe(name, fused, foreach):
    train = TrainSection(lr=0.1, optimizer=name, betas=(0.8, 0.95), eps=1e-6)
    optimizer = make_optimizer([{"params": weights()[:1], "lr": 0.2, "weight_decay": 0.3}], train)
    [group] = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    assert bool(group["fused"]) == bool(fused) and group["foreach"] == foreach
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.2, 0.3, (0.8, 0.95), 1e-6)


@pytest.mark.parametrize("name", ["adamw", "adamw_foreach", "adamw_loop", "sgd"])
def test_a_group_that_names_no_decay_has_none(name):
    optimizer = make_optimizer([{"params": weights()}], TrainSection(lr=0.1, optimizer=name))
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.0)]


def test_sgd_is_plain():
    [weight, _] = weights()
    optimizer = make_optimizer([{"params": [weight]}], TrainSection(lr=0.1, optimizer="sgd"))
    weight.grad = torch.tensor([1.0, 2.0, -1.0])
    optimizer.step()
    assert type(optimizer) is torch.optim.SGD
    assert torch.equal(weight.detach(), torch.ones(3) - 0.1 * weight.grad)


def test_the_three_adamw_take_the_same_steps():
    ends = []
    for name in ("adamw", "adamw_foreach", "adamw_loop"):
        own = weights()
        optimizer = make_optimizer([{"params": own, "weight_decay": 0.1}], TrainSection(lr=0.1, optimizer=name))
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            for weight in own:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
        ends.append(torch.cat([weight.detach().flatten() for weight in own]))
    assert torch.allclose(ends[0], ends[2], atol=1e-6) and torch.allclose(ends[1], ends[2], atol=1e-6)
    assert not torch.allclose(ends[2], torch.cat([weight.detach().flatten() for weight in weights()]), atol=0.05)


def test_each_group_keeps_its_own_rate_under_the_schedule():
    first, second = weights()
    groups = [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.4}]
    optimizer = make_optimizer(groups, TrainSection(lr=0.1))
    assert set_learning_rates(optimizer, 0.0) == [0.0, 0.0]
    assert set_learning_rates(optimizer, 0.5) == [0.05, 0.2]
    assert set_learning_rates(optimizer, 1.0) == [0.1, 0.4] == [group["lr"] for group in optimizer.param_groups]


def test_the_loss_scale_halves_at_an_overflow_and_not_below_one():
    scale = LossScale(4.0)
    seen = []
    for _ in range(4):
        scale.update(overflow=True)
        seen.append(scale.value)
    assert seen == [2.0, 1.0, 1.0, 1.0]


def test_the_loss_scale_doubles_after_enough_good_steps_in_a_row():
    scale = LossScale(8.0, growth_interval=3)
    seen = []
    for overflow in (False, False, True, False, False, False, False, False, False):
        scale.update(overflow)
        seen.append(scale.value)
    assert seen == [8, 8, 4, 4, 4, 8, 8, 8, 16]
