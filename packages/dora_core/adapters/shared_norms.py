"""Norms of many layers in one launch: a norm alone is so short that launching it costs as much."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dora_core.adapters import kernels
from dora_core.adapters.dora_linear import DoRALinear
from dora_core.adapters.sharded import is_partitioned

MAX_LAYERS = 16
"""Of one launch: enough to hide its cost; its partial sums take up to 3 MB a layer of LLaMA-7B's widths."""
MAX_CAST = 1 << 22
"""Of one launch, elements of factors that are cast for it: large ones take long enough by themselves."""


class SharedNorms:
    """Layers of equal sizes: whoever is asked for its norm first in an optimizer step computes that of all."""

    def __init__(self, layers: Sequence[DoRALinear]) -> None:
        self._layers = layers
        self._addresses: tuple[int, ...] = ()
        """Where the tensors were when it was last asked whether they are ``_alike``."""
        self._alike = False
        self._norms: dict[DoRALinear, tuple[tuple, list[int], Tensor]] | None = None
        """Those that nobody has taken yet, with the parameters that they were computed from; None before any is."""
        for layer in layers:
            layer.shared_norms = self

    def take(self, layer: DoRALinear, tensors: tuple, versions: list[int]) -> Tensor | None:
        """Return n [out] of ``layer``, once per step; None if it was taken or is not that of these parameters."""
        if self._norms is None:
            self._norms = self._compute()
        known, known_versions, norm = self._norms.pop(layer, ((), [], None))
        same = known_versions == versions and all([a is b for a, b in zip(known, tensors, strict=False)])
        return norm if same else None

    def _compute(self) -> dict[DoRALinear, tuple[tuple, list[int], Tensor]]:
        tensors = [layer.tensors() for layer in self._layers]
        factors = [(weight, lora_A, lora_B) for weight, _, lora_A, lora_B, _ in tensors]
        addresses = tuple([0 if tensor is None else tensor.data_ptr() for each in factors for tensor in each])
        if addresses != self._addresses:
            key = _key(self._layers[0])
            self._addresses = addresses
            self._alike = key is not None and all([_key(layer) == key for layer in self._layers])
        scale = self._layers[0].scale
        if not self._alike or any([layer.scale != scale for layer in self._layers]):
            return {}
        norms = kernels.row_norms(factors, scale, addresses)
        own = zip(self._layers, tensors, norms, strict=True)
        return {layer: (each, layer.versions(), norm) for layer, each, norm in own}

    def drop(self, layer: DoRALinear) -> None:
        """Do not return the norm that may be waiting for ``layer``."""
        if self._norms is not None:
            self._norms.pop(layer, None)

    def forget(self) -> None:
        """Parameters changed: compute all again when the next is asked for."""
        self._norms = None

    def dissolve(self) -> None:
        """Let each layer compute its norm by itself again."""
        for layer in self._layers:
            layer.shared_norms = None


def share_norms(model: nn.Module) -> list[SharedNorms]:
    """Let the DoRA layers of ``model`` that have equal sizes compute norms together, but for those that do already."""
    by_key: dict[tuple, list[DoRALinear]] = {}
    for layer in model.modules():
        if isinstance(layer, DoRALinear) and layer.shared_norms is None and (key := _key(layer)) is not None:
            by_key.setdefault((layer.scale, *key), []).append(layer)
    shared = []
    for layers in by_key.values():
        num_layers = _num_at_once(layers[0])
        for start in range(0, len(layers), num_layers):
            if len(some := layers[start : start + num_layers]) > 1:
                shared.append(SharedNorms(some))
    return shared


def _num_at_once(layer: DoRALinear) -> int:
    weight, _, lora_A, lora_B, _ = layer.tensors()
    if not kernels.casts_factors(weight, lora_B):
        return MAX_LAYERS
    return max(1, min(MAX_LAYERS, MAX_CAST // (lora_A.numel() + lora_B.numel())))


def _key(layer: DoRALinear) -> tuple | None:
    """What of tensors must be equal in layers whose norms are computed together; None if that is impossible."""
    weight, _, *factors, _ = layer.tensors()
    tensors = [tensor for tensor in (weight, *factors) if tensor is not None]
    if layer.kernel == "plain" or any(is_partitioned(tensor) for tensor in tensors):
        return None
    if kernels.why_not_fused(weight.device.type, weight.dtype) is not None:
        return None
    if kernels.casts_factors(weight, factors[1]) and any([factor.numel() % 8 for factor in factors]):
        return None  # joined, they would not all begin at multiples of 16 bytes
    if not all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in tensors):
        return None
    return (weight.device, *((tensor.shape, tensor.dtype) for tensor in tensors))
