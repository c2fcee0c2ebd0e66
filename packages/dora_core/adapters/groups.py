"""Optimizer groups by what a parameter is: A, B, magnitude and the rest."""

from __future__ import annotations

from torch import nn

from dora_core.adapters.sharded import full_shape


def parameter_role(name: str) -> str:
    """Return low_rank, magnitude or other for a parameter's name."""
    last = name.rsplit(".", 1)[-1]
    return "low_rank" if last in ("lora_A", "lora_B") else "magnitude" if last == "magnitude" else "other"


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    magnitude_lr: float | None = None,
    magnitude_weight_decay: float = 0.0,
    b_lr_ratio: float = 1.0,
    other_lr: float | None = None,
) -> list[dict]:
    """Return optimizer groups of the trainable parameters: A, B, magnitude, other, and other of one dimension.

    ``weight_decay`` applies to A, B and other weights of two or more dimensions; the magnitude has its own, zero
    unless asked for (decay pulls m towards 0, not towards the base). ``b_lr_ratio`` is LoRA+'s. Empty groups are
    left out; each group has a ``name``.
    """
    options = {
        "A": {"lr": lr, "weight_decay": weight_decay},
        "B": {"lr": lr * b_lr_ratio, "weight_decay": weight_decay},
        "magnitude": {"lr": lr if magnitude_lr is None else magnitude_lr, "weight_decay": magnitude_weight_decay},
        "other": {"lr": lr if other_lr is None else other_lr, "weight_decay": weight_decay},
        "other_1d": {"lr": lr if other_lr is None else other_lr, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in options}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = parameter_role(name)
        if role == "low_rank":
            role = name[-1]
        elif role == "other" and len(full_shape(parameter)) < 2:
            role = "other_1d"
        members[role].append(parameter)
    return [{"name": name, "params": members[name], **options[name]} for name in options if members[name]]
