"""LoRA in place of ``nn.Linear``, and what every adapted layer has in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_core.adapters import kernels
from dora_core.adapters.functional import accumulation_dtype, adapted_linear, effective_weight_, gain, row_norm
from dora_core.adapters.sharded import copy_local_part, full_shape, gathered, is_partitioned, restore_local_part_


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """Return s: alpha / rank, or alpha / sqrt(rank) for rsLoRA; 0 without low-rank factors (rank 0)."""
    return alpha / (math.sqrt(rank) if rslora else rank) if rank else 0.0


def _versions(tensors: Iterable[Tensor | None]) -> list[int]:
    return [tensor._version for tensor in tensors if tensor is not None]


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
        kernel: Literal["auto", "plain", "fused"] = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = full_shape(base.weight)
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self._scale = scale_of(rank, alpha, rslora)
        self.dropout, self.dropout_mode, self.kernel = dropout, dropout_mode, kernel
        self.recomputation: kernels.Recomputation = "compute"
        """What activation checkpointing does about the output; see ``keep_outputs``."""
        self.shared_input: Any = None
        """While ``reuse_norms`` is active: the ``SharedInput`` of layers that may be given the same tensor."""
        self.num_reuse_blocks = 0
        """How many ``reuse_norms`` blocks are open around this layer."""
        self._known: tuple[list[int], kernels.Projection] | None = None
        self._stack: kernels.Stack | None = None
        """Of this layer and those that were last computed with it."""
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
        self.forget()

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] in x's type (autocast's, where that is on) for x [..., in]."""
        shared = self.shared_input if not torch.compiler.is_compiling() else None
        if shared is not None and (output := shared.take(self, x)) is not None:
            return output
        given, device = x, x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if self.merged or not self.enabled:
            return F.linear(x, self.weight, self.bias)
        dropout = self.dropout if self.training else 0.0
        if self._is_fused(x):
            if shared is None:
                return kernels.fused_linears(x, self._stack_of([self], x.dtype), dropout)[0]
            layers = shared.layers(self, given)
            return shared.keep(layers, kernels.fused_linears(x, self._stack_of(layers, x.dtype), dropout))
        *tensors, settings = self.projection(row_norm)
        return adapted_linear(
            x,
            *tensors,
            scale=settings.scale,
            dropped=F.dropout(x, dropout) if dropout > 0 else None,
            update_dropout=self.dropout_mode == "update",
            full_norm_gradient=settings.full_norm,
            untouched=settings.untouched,
        )

    def projection(self, compute_norm: Callable[..., Tensor] = kernels.row_norm) -> kernels.Projection:
        """Return the layer's tensors and settings, with the norm; while ``reuse_norms`` is active, the last ones."""
        tensors = self.tensors()
        if not self.num_reuse_blocks or torch.compiler.is_compiling():  # a graph holds no state
            return self._projection(tensors, None, compute_norm)
        # reuse_norms says when an optimizer stepped. Versions only add what they do notice, edits in place
        # and replaced tensors; they miss fused optimizers and writes through .data, so alone they prove nothing.
        versions = _versions(tensors)
        if self._known is not None:
            known_versions, known = self._known
            if known_versions == versions and all([a is b for a, b in zip(known, tensors, strict=False)]):
                return known
        projection = self._projection(tensors, versions, compute_norm)
        self._known = (versions, projection)
        return projection

    def _projection(
        self, tensors: tuple, versions: list[int] | None, compute_norm: Callable[..., Tensor]
    ) -> kernels.Projection:
        norm = self._norm(tensors, versions, compute_norm)
        settings = kernels.Settings(self._scale, self._full_norm_gradient, self._untouched(norm), self.recomputation)
        return kernels.Projection(*tensors, norm, settings)

    def _stack_of(self, layers: Sequence[LoRALinear], dtype: torch.dtype) -> kernels.Stack:
        projections = [layer.projection() for layer in layers]
        stack = self._stack
        if stack is None or not stack.holds(projections, dtype):
            stack = kernels.Stack(projections, dtype)
            if self.num_reuse_blocks and not torch.compiler.is_compiling():
                self._stack = stack
        return stack

    def forget(self) -> None:
        """Forget what was computed from the parameters: they changed."""
        self._known = self._stack = None

    def tensors(self) -> tuple[nn.Parameter | None, ...]:
        """Return W, bias, A, B and m."""
        own = self._parameters  # attributes of a module take longer to find
        return own["weight"], own["bias"], own["lora_A"], own["lora_B"], own["magnitude"]

    def versions(self) -> list[int]:
        """Return how often torch saw each of ``tensors`` change."""
        return _versions(self.tensors())

    def can_share(self) -> bool:
        """Whether a sibling's call can compute this layer: ZeRO-3 gathers a layer's weights for its own call alone."""
        return not (self.merged or is_partitioned(self.weight) or self.kernel == "plain") and self.enabled

    def _is_fused(self, x: Tensor) -> bool:
        if self.kernel == "plain" or (self.kernel == "auto" and not x.is_cuda):
            return False
        reason = kernels.why_not_fused(x.device.type, x.dtype, self.dropout, self.dropout_mode)
        if reason is not None and self.kernel == "fused":
            kernels.refuse(reason)
        return reason is None

    _full_norm_gradient = False

    def _norm(self, tensors: tuple, versions: list[int] | None, compute: Callable[..., Tensor]) -> Tensor | None:
        return None

    def _untouched(self, norm: Tensor | None) -> bool:
        # Asked only until training has moved the layer once: the answer makes a GPU wait.
        if self._known_touched or self.weight.is_meta or torch.compiler.is_compiling():
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

    def __getstate__(self) -> dict[str, Any]:
        # A copy is no part of the block that announces changes to the original.
        return {**self.__dict__, "shared_input": None, "num_reuse_blocks": 0, "_known": None, "_stack": None}

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in (self.lora_A, self.lora_B, self.magnitude) if p is not None]

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, rank={self.rank}, scale={self._scale:g}"

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
