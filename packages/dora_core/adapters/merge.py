"""Merge adapters into the weights, take them out again or turn them off, with the error of a merge stated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_core.adapters.functional import effective_weight_
from dora_core.adapters.linear import LoRALinear


@dataclass(frozen=True)
class MergeReport:
    """What a merge changed."""

    num_layers: int
    max_logit_difference: float | None
    """Largest absolute difference of the model's output on the probe; None if there was no probe."""
    max_logit: float | None
    """Largest absolute value of that output, to compare the difference with."""

    def __str__(self) -> str:
        if self.max_logit_difference is None:
            return f"{self.num_layers} layers, maximum logit difference not measured"
        of = f"{self.max_logit_difference:.3g} of logits up to {self.max_logit:.3g}"
        return f"{self.num_layers} layers, maximum logit difference {of}"


def adapted_layers(model: nn.Module, *, required: bool = True) -> dict[str, LoRALinear]:
    """Return the adapted layers by module name; if they are ``required``, an error if there is none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if required and not layers:
        raise ValueError("The model has no adapted layers. Call apply_adapters or load_adapter first.")
    return layers


def default_probe(model: nn.Module) -> dict[str, Tensor] | None:
    """Return a short input for a causal language model from its vocabulary size, or None for another model."""
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocab_size is None:
        return None
    device = next(model.parameters()).device
    return {"input_ids": (torch.arange(32, device=device) * 7919 % vocab_size)[None]}


def merge_adapters(model: nn.Module, probe: Mapping[str, Any] | None = None) -> MergeReport:
    """Write every layer's effective weight into its weight. ``unmerge_adapters`` restores the base bit for bit.

    The base weights are kept on the CPU meanwhile. Layers are gathered one at a time under ZeRO-3, where every rank
    must call it. ``probe`` holds keyword arguments of ``model``; causal language models need none.
    """
    return _change(model, probe, [layer.merge_ for layer in adapted_layers(model).values()])


def unmerge_adapters(model: nn.Module, probe: Mapping[str, Any] | None = None) -> MergeReport:
    """Put the base weights back exactly as they were; the report compares outputs before and after."""
    return _change(model, probe, [layer.unmerge_ for layer in adapted_layers(model).values()])


def merge_and_unload(model: nn.Module, probe: Mapping[str, Any] | None = None) -> MergeReport:
    """Merge and replace every adapted layer by a plain, frozen ``nn.Linear``: no trace of the adapter is left."""

    def unload(name: str, layer: LoRALinear) -> None:
        layer.merge_(keep_base=False)
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = layer.weight, layer.bias
        model.set_submodule(name, plain.train(layer.training))

    return _change(model, probe, [partial(unload, name, layer) for name, layer in adapted_layers(model).items()])


def merged_weight(layer: LoRALinear) -> Tensor:
    """Return the weight [out, in] that a merge would store, in a tensor of its own. ZeRO-3 must have it gathered."""
    weight = layer.weight.detach()
    if layer.merged:
        return weight.clone()
    with torch.no_grad():
        return effective_weight_(weight.clone(), layer.lora_A, layer.lora_B, layer.magnitude, layer.scale)


def compare_merged(model: nn.Module, probe: Mapping[str, Any] | None = None) -> MergeReport:
    """Return what a merge would change, without merging: each weight is made for its layer's call and dropped.

    So a model whose base is mapped from its files needs no memory for merged weights. Not for models under ZeRO-3. See
    ``merge_adapters`` for ``probe``.
    """
    layers = adapted_layers(model).values()
    probe = default_probe(model) if probe is None else probe
    before = _output(model, probe)
    try:
        for layer in layers:
            layer.forward = partial(_merged_forward, layer)
        after = _output(model, probe)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
    return _report(len(layers), before, after)


def _merged_forward(layer: LoRALinear, x: Tensor) -> Tensor:
    return F.linear(x, merged_weight(layer), layer.bias)


def _change(model: nn.Module, probe: Mapping[str, Any] | None, steps: list[Callable[[], None]]) -> MergeReport:
    probe = default_probe(model) if probe is None else probe
    before = _output(model, probe)
    for step in steps:
        step()
    return _report(len(steps), before, _output(model, probe))


def _report(num_layers: int, before: Tensor | None, after: Tensor | None) -> MergeReport:
    if before is None or after is None:
        return MergeReport(num_layers, None, None)
    before = before.double()
    return MergeReport(num_layers, float((before - after.double()).abs().max()), float(before.abs().max()))


@torch.no_grad()
def _output(model: nn.Module, probe: Mapping[str, Any] | None) -> Tensor | None:
    if probe is None:
        return None
    with evaluation_mode(model):
        output = model(**probe)
    return output if torch.is_tensor(output) else output.logits


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and each back into its own mode at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block every adapted layer returns the base layer's output."""
    layers = adapted_layers(model, required=False).values()
    before = [layer.enabled for layer in layers]
    if any(layer.merged for layer in layers):
        raise ValueError(
            "The adapter is merged into the weights, so it cannot be disabled. Call unmerge_adapters first."
        )
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
