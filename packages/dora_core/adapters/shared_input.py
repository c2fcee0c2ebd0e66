"""Layers that are given the same tensor, such as q, k and v: the first one that is called computes them all.

Then x is read once for all A matrices and once for all their gradients, and the parts of x's gradient are summed while
they are computed. Which layers share their input is not declared but seen: the first optimizer step computes each layer
by itself and notes who was called with the same tensor. From then on, within a step, nothing changes, so that the
recomputation of activation checkpointing does what the first pass did.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dora_core.adapters.linear import LoRALinear


class SharedInput:
    """Sibling layers with equally many inputs, and who of them was seen to share its input with whom."""

    def __init__(self, layers: Sequence[LoRALinear]) -> None:
        self._layers = layers
        self._followers: dict[LoRALinear, list[LoRALinear]] = {}
        """By the layer that is called first: those that will be called with the same tensor."""
        self._seen: dict[LoRALinear, list[LoRALinear]] = {}
        self._first: LoRALinear | None = None
        self._x: Callable[[], Tensor | None] = lambda: None
        self._given: tuple = ()
        self._outputs: dict[LoRALinear, tuple[Tensor, list[int]]] = {}
        for layer in layers:
            layer.shared_input = self

    def take(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """Return the output of ``layer`` for x, if it was computed with a sibling's and holds."""
        if not self._outputs or not self._is_last(layer, x):
            return None
        output, versions = self._outputs.pop(layer, (None, []))
        return output if versions == layer.versions() else None

    def layers(self, layer: LoRALinear, x: Tensor) -> list[LoRALinear]:
        """Return the layers to compute for x now that ``layer`` is called, itself first; ``keep`` the outputs."""
        if layer is not self._first and self._is_last(layer, x):
            self._seen[self._first].append(layer)
            return [layer]
        self._first, self._x, self._given, self._outputs = layer, weakref.ref(x), _given(layer, x), {}
        followers = self._followers.get(layer, [])
        self._seen[layer] = list(followers)
        return [layer, *followers]

    def keep(self, layers: Sequence[LoRALinear], outputs: Sequence[Tensor]) -> Tensor:
        """Return the first of the outputs, and keep the others until their layers are called."""
        for layer, output in zip(layers[1:], outputs[1:], strict=True):
            self._outputs[layer] = (output, layer.versions())
        return outputs[0]

    def _is_last(self, layer: LoRALinear, x: Tensor) -> bool:
        """Whether the call of ``layer`` with x is like the last one that led."""
        return x is self._x() and _given(layer, x) == self._given

    def forget(self) -> None:
        """Drop outputs that nobody came for, and expect from now on those who came since the last call."""
        for layer in self._outputs:
            self._seen[self._first].remove(layer)
        self._followers = {first: [*dict.fromkeys(others)] for first, others in self._seen.items()}
        self._first, self._x, self._outputs = None, lambda: None, {}

    def dissolve(self) -> None:
        """Let each layer compute by itself again."""
        for layer in self._layers:
            layer.shared_input = None


def _given(layer: LoRALinear, x: Tensor) -> tuple:
    """What else an output depends on."""
    return (0 if x.is_inference() else x._version, torch.is_grad_enabled(), layer.training, layer.enabled)


def share_inputs(model: nn.Module) -> list[SharedInput]:
    """Let siblings among the adapted layers of ``model`` compute together, but for those that do already."""
    groups = []
    for parent in model.modules():
        by_input: dict[tuple, list[LoRALinear]] = {}
        for layer in parent.children():
            if isinstance(layer, LoRALinear) and layer.shared_input is None and layer.can_share():
                key = (layer.in_features, layer.dropout, layer.kernel, layer.recomputation)
                by_input.setdefault(key, []).append(layer)
        groups += [SharedInput(layers) for layers in by_input.values() if len(layers) > 1]
    return groups
