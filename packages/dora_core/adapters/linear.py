"""LoRA and DoRA in place of ``nn.Linear``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_core.adapters.functional import accumulation_dtype, adapted_linear, effective_weight_, gain, row_norm
from dora_core.adapters.sharded import copy_local_part, full_shape, gathered, restore_local_part_


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """Return s: alpha / rank, or alpha / sqrt(rank) for rsLoRA; 0 without low-rank factors (rank 0)."""
    return alpha / (math.sqrt(rank) if rslora else rank) if rank else 0.0


class LoRALinear(nn.Module):
    """y = x W^T + s drop(x) A^T B^T + bias, in place of an ``nn.Linear`` whose weight it takes over and freezes.

    ``weight`` [out, in] and ``bias`` [out] are the base layer's own parameters, so state-dict keys stay and ZeRO-3
    gathers them with this module. ``lora_A`` [r, in] and ``lora_B`` [out, r] are fp32 whatever the base's type
    (fp64 for fp64). A is Kaiming-uniform (a = sqrt 5), B zero.
    """

    magnitude: nn.Parameter | None

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        *,
        rslora: bool = False,
        dropout: float = 0.0,
        dropout_mode: Literal["lowrank", "update"] = "lowrank",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = full_shape(base.weight)
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self._scale = scale_of(rank, alpha, rslora)
        self.dropout, self.dropout_mode = dropout, dropout_mode
        self.enabled = True
        self.base_weight: Tensor | None = None
        """While merged: this rank's part of the base weight, on the CPU, so that unmerging is exact."""
        self._known_touched = False
        self.register_parameter("magnitude", None)
        if not rank:
            self.register_parameter("lora_A", None)
            self.register_parameter("lora_B", None)
            return
        like = {"dtype": accumulation_dtype(self.weight.dtype), "device": self.weight.device}
        lora_A = torch.empty(rank, self.in_features, dtype=like["dtype"])
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(lora_A.to(self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **like))

    @property
    def scale(self) -> float:
        """s, the factor of the low-rank update. Setting it drops what was computed with the old one."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = value
        self.invalidate()

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the merged weight."""
        return self.base_weight is not None

    def invalidate(self) -> None:
        """Forget everything derived from the parameters; call it after writing to them behind torch's back."""
        self._known_touched = False

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] in x's type (autocast's, where that is on) for x [..., in]."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if self.merged or not self.enabled:
            return F.linear(x, self.weight, self.bias)
        norm = self._norm()
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        return adapted_linear(
            x,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.magnitude,
            norm,
            scale=self._scale,
            dropped=dropped,
            update_dropout=self.dropout_mode == "update",
            full_norm_gradient=self._full_norm_gradient,
            untouched=self._untouched(norm),
        )

    _full_norm_gradient = False

    def _norm(self) -> Tensor | None:
        return None

    def _untouched(self, norm: Tensor | None) -> bool:
        # Asked only until training has moved the layer once: the answer makes a GPU wait.
        if self._known_touched or self.weight.is_meta:
            return False
        with torch.no_grad():
            same = self.lora_B is None or not self.lora_B.any()
            if same and norm is not None:
                same = bool((gain(self.magnitude, norm) == 1).all())
        self._known_touched = not same
        return same

    @torch.no_grad()
    def merge_(self, *, keep_base: bool = True) -> None:
        """Write the effective weight into ``weight``. Every rank calls it (ZeRO-3).

        The base is kept on the CPU for ``unmerge_``; without it the layer must not be used as an adapter again.
        """
        if self.merged:
            return
        if keep_base:
            self.base_weight = copy_local_part(self.weight)
        with gathered([self.weight], modify=True), gathered(self._trained()):
            effective_weight_(self.weight, self.lora_A, self.lora_B, self.magnitude, self._scale)
        self.invalidate()

    @torch.no_grad()
    def unmerge_(self) -> None:
        """Put the base weight back, bit for bit. Every rank calls it (ZeRO-3)."""
        if not self.merged:
            return
        restore_local_part_(self.weight, self.base_weight)
        self.base_weight = None
        self.invalidate()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in (self.lora_A, self.lora_B, self.magnitude) if p is not None]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, scale={self._scale:g}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALinear:
        # What is trained stays in fp32: model.half() and friends convert the frozen weight alone.
        before = [parameter.data for parameter in self._trained()]
        super()._apply(fn, recurse)
        dtype = accumulation_dtype(self.weight.dtype)
        for parameter, old in zip(self._trained(), before, strict=True):
            if parameter.dtype != old.dtype:
                parameter.data = old.to(device=parameter.device, dtype=dtype)
        self.invalidate()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.invalidate()


class DoRALinear(LoRALinear):
    """y = x (m/n * (W + s B A))^T + bias: the paper's eq. 5 in row form, in place of an ``nn.Linear``.

    ``magnitude`` m [out] is fp32 (fp64 for fp64) and starts as the row norm of W + s B A, so a fresh layer returns
    the base layer's output bit for bit. Rank 0 trains the magnitude only (Table 6). ``norm_gradient`` detached is
    eq. 11, full is eq. 6. The norm n is computed at every call unless ``reuse_norms`` is active.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        *,
        norm_gradient: Literal["detached", "full"] = "detached",
        **options: Any,
    ) -> None:
        super().__init__(base, rank, alpha, **options)
        self.norm_gradient = norm_gradient
        self.num_norms_computed = 0
        self.num_reuse_blocks = 0
        """How many ``reuse_norms`` blocks are open around this layer."""
        self._cached: tuple[tuple[Tensor | None, ...], tuple[int, ...], Tensor] | None = None
        with gathered([self.weight]):
            self.magnitude = nn.Parameter(row_norm(self.weight, self.lora_A, self.lora_B, self._scale))

    @property
    def _full_norm_gradient(self) -> bool:
        return self.norm_gradient == "full" and self.rank > 0

    def invalidate(self) -> None:
        super().invalidate()
        self.forget_norm()

    def forget_norm(self) -> None:
        """Compute the norm again at the next call."""
        self._cached = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy is no part of the block that announces changes to the original.
        return {**self.__dict__, "num_reuse_blocks": 0, "_cached": None}

    def _norm(self) -> Tensor:
        if not self.num_reuse_blocks:
            return self._compute_norm()
        # reuse_norms says when an optimizer stepped. Versions only add what they do notice, edits in place
        # and replaced tensors; they miss fused optimizers and writes through .data, so alone they prove nothing.
        parts = (self.weight, self.lora_A, self.lora_B)
        versions = tuple(part._version for part in parts if part is not None)
        if self._cached is not None:
            known_parts, known_versions, norm = self._cached
            if known_versions == versions and all(a is b for a, b in zip(known_parts, parts, strict=True)):
                return norm
        self._cached = (parts, versions, self._compute_norm())
        return self._cached[2]

    def _compute_norm(self) -> Tensor:
        self.num_norms_computed += 1
        return row_norm(self.weight, self.lora_A, self.lora_B, self._scale)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block every adapted layer returns the base layer's output."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
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
