"""DoRA in place of ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dora_core.adapters import kernels
from dora_core.adapters.functional import row_norm
from dora_core.adapters.linear import LoRALinear
from dora_core.adapters.sharded import gathered


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
        self.shared_norms: Any = None
        """While ``reuse_norms`` is active: the ``SharedNorms`` of layers of equal sizes."""
        with gathered([self.weight]):
            self.magnitude = nn.Parameter(row_norm(self.weight, self.lora_A, self.lora_B, self._scale))

    @property
    def _full_norm_gradient(self) -> bool:
        return self.norm_gradient == "full" and self.rank > 0

    def _norm(self, tensors: tuple, versions: list[int] | None, compute: Callable[..., Tensor]) -> Tensor:
        if not torch.compiler.is_compiling():
            self.num_norms_computed += 1
            if self.shared_norms is not None and compute is kernels.row_norm:
                norm = self.shared_norms.take(self, tensors, versions)
                if norm is not None:
                    return norm
        weight, _, lora_A, lora_B, _ = tensors
        return compute(weight, lora_A, lora_B, self._scale)

    def forget(self) -> None:
        """Forget what was computed from the parameters: they changed."""
        super().forget()
        if self.shared_norms is not None:
            self.shared_norms.drop(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "shared_norms": None}
