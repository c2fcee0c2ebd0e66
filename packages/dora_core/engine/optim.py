"""Optimizers, learning-rate schedules and the loss scale of fp16."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dora_core.config import TrainSection


def make_optimizer(groups: list[dict], train: TrainSection) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over groups with a learning rate each; a group that names no decay has none."""
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr)
    how = {"adamw": {"fused": True}, "adamw_foreach": {"foreach": True}, "adamw_loop": {"foreach": False}}
    return torch.optim.AdamW(
        groups, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=0.0, **how[train.optimizer]
    )


def num_warmup_steps(train: TrainSection, num_steps: int) -> int:
    """Return the warm-up length in optimizer steps."""
    return train.warmup_steps if train.warmup_ratio is None else math.ceil(train.warmup_ratio * num_steps)


def lr_factor(train: TrainSection, step: int, num_steps: int) -> float:
    """Return what multiplies the learning rates at optimizer step ``step`` (0 to num_steps - 1).

    Warm-up rises linearly from 0 at step 0; linear and cosine then fall to 0 at ``num_steps``. A function of the
    step alone, so there is no schedule state to save.
    """
    warmup = num_warmup_steps(train, num_steps)
    if step < warmup:
        return step / max(1, warmup)
    if train.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return 1.0 - done if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> list[float]:
    """Set each group's learning rate to ``factor`` times its own first value; return them."""
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * factor
    return [group["lr"] for group in optimizer.param_groups]


@dataclass
class LossScale:
    """Dynamic loss scale: halved at an overflow, doubled after ``growth_interval`` steps without one."""

    value: float = 1.0
    growth_interval: int = 1000
    num_good_steps: int = 0

    def update(self, overflow: bool) -> None:
        """Count one optimizer step that did or did not overflow."""
        if overflow:
            self.value, self.num_good_steps = max(1.0, self.value / 2), 0
            return
        self.num_good_steps += 1
        if self.num_good_steps >= self.growth_interval:
            self.value, self.num_good_steps = self.value * 2, 0
