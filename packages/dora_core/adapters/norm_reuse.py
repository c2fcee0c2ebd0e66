"""The sound reuse of DoRA's row norm: once per optimizer step instead of once per call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from dora_core.adapters.linear import LoRALinear
from dora_core.adapters.shared_input import SharedInput, share_inputs
from dora_core.adapters.shared_norms import SharedNorms, share_norms


class NormReuse:
    """The training loop's word on when parameters changed; made by ``reuse_norms``."""

    def __init__(self, layers: list[LoRALinear], groups: list[SharedInput | SharedNorms]) -> None:
        self._layers = layers
        self._groups = groups

    def parameters_changed(self, *_: Any) -> None:
        """Say that parameters were written: every layer computes its norm again at its next call."""
        for layer in self._layers:
            layer.forget()
        for group in self._groups:
            group.forget()


@contextmanager
def reuse_norms(model: nn.Module) -> Iterator[NormReuse]:
    """Within the block, compute each layer's norm once per optimizer step instead of once per call.

    Micro-batches and the recomputation of activation checkpointing share it. Every step of a ``torch.optim``
    optimizer announces itself (fused ones and those inside DeepSpeed too). Loading, merging, moving, a changed scale
    and edits in place are noticed. A write through ``.data`` must be announced with ``parameters_changed()``. From the
    second step on, fused layers that are given the same tensor are computed together (``shared_input``), and norms of
    layers of equal sizes are computed in one launch (``shared_norms``).
    Blocks may be nested; layers put in within the block, and copies of the model, compute at every call.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    groups = [*share_inputs(model), *share_norms(model)]
    handle = NormReuse(layers, groups)
    hook = register_optimizer_step_post_hook(handle.parameters_changed)
    for layer in layers:
        layer.num_reuse_blocks += 1
    try:
        yield handle
    finally:
        hook.remove()
        for group in groups:
            group.dissolve()
        for layer in layers:
            layer.num_reuse_blocks -= 1
            layer.forget()
