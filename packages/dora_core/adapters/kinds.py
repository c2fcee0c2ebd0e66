"""The adapter kinds of the registry: what each does to one module that a target pattern matched."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dora_core.adapters.config import AdapterConfig
from dora_core.adapters.dora_linear import DoRALinear
from dora_core.adapters.functional import accumulation_dtype
from dora_core.adapters.linear import LoRALinear
from dora_core.adapters.sharded import is_partitioned
from dora_core.registry import ADAPTERS


def train_in_full_precision(parameters: Iterable[nn.Parameter]) -> None:
    """Make parameters trainable, in fp32 (autocast narrows them in the forward pass)."""
    for parameter in parameters:
        parameter.requires_grad_(True)
        widen(parameter)


def widen(parameter: nn.Parameter) -> None:
    """Keep a parameter in fp32 from now on, fp64 if it is that."""
    dtype = accumulation_dtype(parameter.dtype)
    if parameter.dtype != dtype:
        if is_partitioned(parameter):
            parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtype)
        parameter.data = parameter.data.to(dtype)


def _options(config: AdapterConfig, generator: torch.Generator) -> dict:
    return {
        "rslora": config.rslora,
        "dropout": config.dropout,
        "dropout_mode": config.dropout_mode,
        "kernel": config.kernel,
        "generator": generator,
    }


@ADAPTERS.register("lora")
def lora(module: nn.Linear, config: AdapterConfig, rank: int, alpha: float, generator: torch.Generator) -> nn.Module:
    """Return a ``LoRALinear`` that takes over ``module``'s weight."""
    return LoRALinear(module, rank, alpha, **_options(config, generator))


@ADAPTERS.register("dora")
def dora(module: nn.Linear, config: AdapterConfig, rank: int, alpha: float, generator: torch.Generator) -> nn.Module:
    """Return a ``DoRALinear`` that takes over ``module``'s weight; of rank 0 for the magnitude alone."""
    return DoRALinear(module, rank, alpha, norm_gradient=config.norm_gradient, **_options(config, generator))


@ADAPTERS.register("full")
def full(module: nn.Module, config: AdapterConfig, rank: int, alpha: float, generator: torch.Generator) -> nn.Module:
    """Return ``module`` itself with its own parameters trainable."""
    train_in_full_precision(module.parameters(recurse=False))
    return module


@ADAPTERS.register("none")
def none(module: nn.Module, config: AdapterConfig, rank: int, alpha: float, generator: torch.Generator) -> nn.Module:
    """Return ``module`` as it is, frozen."""
    return module
