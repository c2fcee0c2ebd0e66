"""Make a DeepSpeed engine for a model whose trainable parameters are fp32 and whose frozen ones need not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from dora_core.adapters.checkpoint import load_adapter
from dora_core.adapters.groups import parameter_groups, parameter_role
from dora_core.adapters.merge import evaluation_mode
from dora_core.config import TrainSection
from dora_core.engine.distributed import World
from dora_core.engine.loss import LossHead
from dora_core.engine.optim import LossScale, lr_factor, make_optimizer, set_learning_rates
from dora_core.engine.zero import Zero

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Engine:
    """A model under DeepSpeed, with one loss denominator and a learning rate that follows from the step.

    One optimizer step is ``begin_step``, ``accumulation`` times (forward, ``backward``), then ``end_step``.
    """

    deepspeed: deepspeed.DeepSpeedEngine
    train: TrainSection
    world: World
    stage: int
    accumulation: int
    loss_scale: LossScale = field(default_factory=LossScale)
    num_skipped_in_row: int = 0

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self.deepspeed.module

    @property
    def loss_head(self) -> LossHead | None:
        """What computes the loss without logits, where ``use_liger`` has put one into the model."""
        return getattr(self.module, "loss_head", None)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer, DeepSpeed's wrapper taken off."""
        return getattr(self.deepspeed.optimizer, "optimizer", self.deepspeed.optimizer)

    def __call__(self, **inputs: Tensor):
        return self.deepspeed(**inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block the model is in evaluation mode. Every rank must enter it.

        Afterwards ZeRO-3 lets go of what a forward pass without a backward pass left gathered, or on its way: such
        weights could not be gathered by name.
        """
        try:
            with evaluation_mode(self.module):
                yield
        finally:
            if self.stage == 3:
                self.deepspeed.empty_partition_cache()

    def begin_step(self, step: int, num_steps: int) -> list[float]:
        """Set and return the groups' learning rates for optimizer step ``step``."""
        return set_learning_rates(self.deepspeed.optimizer, lr_factor(self.train, step, num_steps))

    def backward(self, loss_sum: Tensor, denominator: float) -> None:
        """Accumulate the gradient of ``loss_sum / denominator``, where the denominator counts all micro-batches and
        ranks of the step. DeepSpeed averages over ranks, hence the factor."""
        loss = loss_sum * (self.world.size / denominator)
        if self.stage == 0:
            loss = loss * self.loss_scale.value
        elif self.train.precision == "fp16":
            self.deepspeed.optimizer.override_loss_scale(self.loss_scale.value)
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()

    def end_step(self) -> tuple[float, bool]:
        """Clip, step and clear; return the gradient norm before clipping and whether the step was applied.

        A gradient that is not finite is not applied, on all ranks alike.
        """
        norm = None
        if self.stage == 0:
            norm, applied = self._end_step_unsharded()
        else:
            self.deepspeed.step()
            applied = self.deepspeed.was_step_applied()
            norm = self.deepspeed.get_global_grad_norm()
        if self.train.precision == "fp16":
            self.loss_scale.update(not applied)
        self.num_skipped_in_row = 0 if applied else self.num_skipped_in_row + 1
        return float("nan") if norm is None else float(norm), applied

    def _end_step_unsharded(self) -> tuple[Tensor, bool]:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        if self.train.precision == "fp16":
            for parameter in parameters:
                parameter.grad.div_(self.loss_scale.value)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        applied = bool(torch.isfinite(norm))
        if not applied:
            for parameter in parameters:
                parameter.grad = None  # the optimizer passes over parameters without a gradient
        elif self.train.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.train.clip_grad_norm, norm)
        self.deepspeed.step()
        return norm, applied


def recipe_groups(model: nn.Module, train: TrainSection) -> list[dict]:
    """Return the optimizer's parameter groups with the learning rates and decays of the recipe."""
    return parameter_groups(
        model,
        train.lr,
        weight_decay=train.weight_decay,
        magnitude_lr=train.magnitude_lr,
        magnitude_weight_decay=train.magnitude_weight_decay,
        b_lr_ratio=train.b_lr_ratio,
    )


def build_engine(model: nn.Module, groups: list[dict], train: TrainSection, zero: Zero, world: World) -> Engine:
    """Return the engine. Every rank must call it; ``groups`` come from ``recipe_groups`` or ``parameter_groups``.

    Raises ``ValueError`` if nothing is trainable.
    """
    if not groups:
        raise ValueError(
            "No parameter is trainable. Set adapter.kind to dora, lora or full, or name adapter.trainable."
        )
    narrow_forward(model, train.precision, world.device.type)
    if zero.stage == 0:
        model.to(world.device)
    optimizer = make_optimizer(groups, train)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero.config, dist_init_required=False)
    if zero.stage == 0 and world.size == 1:
        engine.enable_backward_allreduce = False  # it would copy every gradient into a bucket and back
    scale = LossScale(2.0**16) if train.precision == "fp16" else LossScale()
    return Engine(engine, train, world, zero.stage, zero.config["gradient_accumulation_steps"], scale)


def ready_to_answer(
    model: nn.Module,
    adapter: Path | None,
    precision: str,
    device: torch.device,
    load: Callable[[nn.Module, Path], Any] = load_adapter,
) -> nn.Module:
    """Return ``model`` in evaluation mode on ``device``, an adapter of a folder in it, unmerged, if one is given."""
    if adapter is not None:
        load(model, adapter)
        narrow_forward(model, precision, device.type)
    return model.to(device).eval()


def narrow_forward(model: nn.Module, precision: str, device_type: str) -> None:
    """Run the forward pass under autocast if a module beside the adapters has trainable fp32 weights.

    So has a model of another ``precision`` that is trained, or that an adapter with such weights was loaded into. The
    adapters' own layers compute in the frozen weights' type by themselves and need none of it.
    """
    if precision == "fp32":
        return
    if any(p.requires_grad and parameter_role(name) == "other" for name, p in model.named_parameters()):
        # one context each: an entered one that is entered again forgets what to restore
        model.forward = torch.autocast(device_type, DTYPES[precision])(model.forward)
        if hasattr(model, "generate"):  # which may call parts of the model, such as an encoder, by themselves
            model.generate = torch.autocast(device_type, DTYPES[precision])(model.generate)
