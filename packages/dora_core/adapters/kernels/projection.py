"""What the fused kernels are told about an adapted layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dora_core.adapters.kernels.cost import Form


class Settings(NamedTuple):
    """What of a layer is not a tensor."""

    scale: float = 1.0
    full_norm: bool = False
    """Whether the norm is differentiated (eq. 6)."""
    untouched: bool = False
    """The promise that B = 0 and g = 1."""
    form: Form | None = None
    """The way of computing; the cost rule's if not given. What ``merged`` cannot do is composed in any case."""


class Projection(NamedTuple):
    """W [out, in], bias [out], A [r, in], B [out, r], m [out] and n [out] of a layer: ``None`` for what it lacks."""

    weight: Tensor
    bias: Tensor | None = None
    lora_A: Tensor | None = None  # noqa: N815
    lora_B: Tensor | None = None  # noqa: N815
    magnitude: Tensor | None = None
    norm: Tensor | None = None
    settings: Settings = Settings()

    @property
    def rank(self) -> int:
        """r, 0 without low-rank factors."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]
