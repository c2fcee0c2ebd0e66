"""What the fused kernels are told about adapted layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dora_core.adapters.kernels.cost import Form
from dora_core.adapters.kernels.kept_outputs import Recomputation

MAX_KEPT = 1 << 20
"""A ``Stack`` keeps copies of factors with up to so many elements; larger ones cost memory and save little time."""


class Settings(NamedTuple):
    """What of a layer is not a tensor."""

    scale: float = 1.0
    full_norm: bool = False
    """Whether the norm is differentiated (eq. 6)."""
    untouched: bool = False
    """The promise that B = 0 and g = 1."""
    recomputation: Recomputation = "compute"
    """What activation checkpointing does about the output; see ``keep_outputs``."""
    form: Form | None = None
    """The way of computing; the cost rule's if not given. What the others cannot do is composed in any case."""


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


class Stack:
    """Layers that share x, with the factors as products in x's type take them.

    Copies hold as long as the projections do. Casting and joining factors at every call would cost a small batch as
    many launches as the products themselves.
    """

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype) -> None:
        self.projections = tuple(projections)
        self.dtype = dtype
        self.ranks = [p.rank for p in projections if p.rank]
        self.unused = projections[0].weight.new_empty((), dtype=dtype)
        """For arguments that an operator must be given and does not read."""
        num_elements = sum(sum(p.weight.shape) * p.rank for p in projections)
        ways = {p.settings.recomputation for p in projections}
        self.recomputation: Recomputation = ways.pop() if len(ways) == 1 else "compute"
        self._keeps = num_elements <= MAX_KEPT
        self._lora_A: Tensor | None = None
        self._lora_B: list[Tensor | None] = [None] * len(projections)

    def holds(self, projections: Sequence[Projection], dtype: torch.dtype) -> bool:
        """Whether this is the stack of these projections."""
        own = self.projections
        same = dtype is self.dtype and len(own) == len(projections)
        return same and all([a is b for a, b in zip(own, projections, strict=True)])

    def __len__(self) -> int:
        return len(self.projections)

    def lora_A(self, i: int | None = None) -> Tensor:  # noqa: N802
        """Return [A_1; A_2; ...], of sizes [sum of ranks, in], or A_i [r, in] alone."""
        stacked, alone = self._lora_A, i is not None and len(self) > 1
        if stacked is None:
            if alone and not self._keeps:
                return self.projections[i].lora_A.to(self.dtype)
            factors = [p.lora_A for p in self.projections if p.rank]
            stacked = (factors[0] if len(factors) == 1 else torch.cat(factors)).to(self.dtype)
            if self._keeps:
                self._lora_A = stacked
        if not alone:
            return stacked
        start = sum([p.rank for p in self.projections[:i]])
        return stacked[start : start + self.projections[i].rank]

    def lora_B(self, i: int) -> Tensor | None:  # noqa: N802
        """Return B_i [out, r], if any."""
        lora_B = self._lora_B[i]
        if lora_B is None and self.projections[i].rank:
            lora_B = self.projections[i].lora_B.to(self.dtype)
            if self._keeps:
                self._lora_B[i] = lora_B
        return lora_B
