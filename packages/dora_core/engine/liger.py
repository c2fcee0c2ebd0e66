"""Whether a run trains with Liger's kernels, which of them fit its model, and the line that says so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dora_core.config import ConfigError, TrainSection
from dora_core.engine.loss import LossHead

DECODERS = ("gemma", "gemma2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
"""Types of language models whose layers were compared with Liger's."""
LOGITS_AS_THEY_ARE = (*(name for name in DECODERS if name != "gemma2"), "bart", "llava")
"""Types of models that return their output layer's logits without scaling or capping them; BART adds a bias."""


@dataclass(frozen=True)
class LigerReport:
    """What was replaced in a model, and why the rest was not."""

    used: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"Liger kernels: {', '.join(self.used) or 'none'}" + "".join(f"; {reason}" for reason in self.left)


def use_liger(model: nn.Module, train: TrainSection, device: torch.device) -> LigerReport:
    """Let ``model`` train on ``device`` with Liger's kernels as ``train.liger`` says; return what was done.

    Call it after ``apply_adapters`` and before ``build_engine``. RMSNorm, RoPE and SwiGLU are Liger's in training mode
    only. The loss is that of a ``LossHead`` in training and validation alike; a model called for its logits returns
    them as ever. Raises ``ConfigError`` if ``train.liger`` is on and nothing can be replaced.
    """
    if train.liger == "off":
        return LigerReport(left=("train.liger is off",))
    obstacle = _obstacle(device)
    report = LigerReport(left=(obstacle,)) if obstacle else replace(model)
    if train.liger == "on" and not report.used:
        raise ConfigError(
            f"train.liger is 'on', but {'; '.join(report.left)}. Liger's kernels need a CUDA GPU, the package "
            f"liger-kernel and a model of type {', '.join(sorted({*DECODERS, *LOGITS_AS_THEY_ARE}))}. "
            "Set train.liger: auto, or off."
        )
    return report


def _obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"they need a CUDA GPU and the run is on the {device.type}"
    try:
        import dora_core.engine.liger_kernels  # noqa: F401
    except ImportError as error:
        return f"liger-kernel cannot be imported ({error})"
    return None


def replace(model: nn.Module) -> LigerReport:
    """Replace in ``model`` what Liger has a kernel for, on whatever device it is; liger-kernel must be installed."""
    from dora_core.engine.liger_kernels import linear_loss, replace_kernels

    used, left = [], []
    decoder = model.get_decoder()
    if decoder.config.model_type in DECODERS:
        used += [f"{name} in {number} layers" for name, number in sorted(replace_kernels(decoder).items())]
    else:
        left.append(f"none of its layers is for a {decoder.config.model_type}")
    if model.config.model_type in LOGITS_AS_THEY_ARE:
        model.loss_head = LossHead(model, linear_loss)
        adapted = model.loss_head.linear_loss is None
        used.append("cross-entropy in chunks (the output layer is adapted)" if adapted else "linear cross-entropy")
    else:
        left.append(f"the loss is from whole logits, which a {model.config.model_type} may scale or cap")
    return LigerReport(tuple(used), tuple(left))
