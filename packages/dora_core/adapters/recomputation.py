"""Activation checkpointing of a model with adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from dora_core.adapters.config import AdapterConfig
from dora_core.adapters.kernels import keep_outputs


def checkpoint_activations(model: nn.Module, config: AdapterConfig) -> None:
    """Turn on the activation checkpointing of a transformers ``model``, which keeps ``config.kept_outputs``.

    ``torch.compile`` cannot trace a block that keeps outputs.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if config.kept_outputs:
        options["context_fn"] = keep_outputs
    model.gradient_checkpointing_enable(options)
