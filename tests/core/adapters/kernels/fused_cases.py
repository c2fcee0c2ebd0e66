"""A fused linear product and the same in float64, for tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dora_core.adapters.functional import row_norm
from dora_core.adapters.kernels import Projection, Settings, fused_linears


@dataclass
class Case:
    """Tensors of one adapted layer and its input; leaves require grad."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor | None  # noqa: N815
    lora_B: Tensor | None  # noqa: N815
    magnitude: Tensor | None
    scale: float = 0.7

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What has a gradient, by name."""
        names = ("x", "bias", "lora_A", "lora_B", "magnitude")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def norm(self) -> Tensor:
        """n of the present parameters."""
        factors = [None if t is None else t.detach() for t in (self.lora_A, self.lora_B)]
        return row_norm(self.weight, *factors, self.scale)

    def fused(self, form: str | None = None, *, full_norm: bool = False, dropout: float = 0.0) -> Tensor:
        """The fused output."""
        settings = Settings(self.scale, full_norm, form=form)
        norm = None if self.magnitude is None else self.norm()
        projection = Projection(self.weight, self.bias, self.lora_A, self.lora_B, self.magnitude, norm, settings)
        return fused_linears(self.x, [projection], dropout)[0]

    def exact(self, dy: Tensor, *, full_norm: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Output and gradients in float64."""
        leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in self.leaves.items()}
        v = self.weight.double()
        if self.lora_A is not None:
            v = v + self.scale * leaves["lora_B"] @ leaves["lora_A"]
        if self.magnitude is not None:
            norm = torch.linalg.vector_norm(v, dim=1)
            v = v * (leaves["magnitude"] / (norm if full_norm else norm.detach()))[:, None]
        y = leaves["x"] @ v.t()
        y = y + leaves["bias"] if self.bias is not None else y
        return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.double()), strict=True))


def make(
    num_tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bias: bool = False,
    magnitude: bool = True,
    adapter_dtype: torch.dtype = torch.float32,
    change: float = 0.1,
) -> Case:
    """Return a layer whose gain differs from 1, and whose update is, about ``change``."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device=device, dtype=to)

    case = Case(
        x=randn(2, num_tokens // 2, in_features).requires_grad_(),
        weight=randn(out_features, in_features, scale=0.02),
        bias=randn(out_features).requires_grad_() if bias else None,
        lora_A=randn(rank, in_features, scale=in_features**-0.5, to=adapter_dtype).requires_grad_() if rank else None,
        lora_B=randn(out_features, rank, scale=0.1 * change, to=adapter_dtype).requires_grad_() if rank else None,
        magnitude=None,
    )
    if magnitude:
        gain = 1 + change * randn(out_features, to=torch.float32)
        case.magnitude = (case.norm() * gain).requires_grad_()
    return case


def error(value: Tensor, exact: Tensor) -> float:
    """Return the error relative to the norm of what is exact."""
    return float((value.detach().double() - exact).norm() / exact.norm())
