"""Outputs that activation checkpointing keeps: a layer's product that the recomputation then need not do again.

A layer's output is recomputed for the gradient of its magnitude alone where nothing else in the block needs it, as the
last projection of a transformer's block. ``torch.utils.checkpoint`` has such a choice too (selective checkpointing),
by operator and with a Python call for each that a block runs; here it is a layer's own, and others run as they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Computed(NamedTuple):
    """What the forward pass of layers that share their input computes."""

    outputs: Sequence[Tensor]
    """[..., out] of each."""
    kept: Sequence[Tensor | None]
    """Of each what the magnitude's gradient needs, if any: the output itself, or the base product."""
    hidden: Tensor | None
    """drop(x) A^T [T, sum of ranks], if it was needed."""

    def aliases(self) -> Computed:
        """Return the same memory in tensors that autograd has not seen."""
        outputs = [y.detach() for y in self.outputs]
        pairs = zip(self.outputs, self.kept, outputs, strict=True)
        kept = [new if each is y else each for y, each, new in pairs]
        return Computed(outputs, kept, self.hidden)


class _Pass:
    """A pass through a checkpointed block: the first one keeps, the recomputation takes in the same order."""

    _of_thread = threading.local()  # the recomputation runs in a thread of autograd's

    def __init__(self, results: list[tuple[Computed, list[int]]], is_first: bool) -> None:
        self._results, self._is_first = results, is_first

    def __enter__(self) -> None:
        self._outer, self._position = self.current(), 0
        self._of_thread.current = self

    def __exit__(self, *_: object) -> None:
        self._of_thread.current = self._outer

    @classmethod
    def current(cls) -> _Pass | None:
        return getattr(cls._of_thread, "current", None)

    def result(self, compute: Callable[[], Computed]) -> Computed:
        if self._is_first:
            result = compute()
            self._results.append((result.aliases(), _versions(result)))
            return result
        result, versions = self._results[self._position]
        self._position += 1
        return result.aliases() if versions == _versions(result) else compute()  # a model may write to an output


def _versions(result: Computed) -> list[int]:
    return [y._version for y in result.outputs]


def keep_outputs() -> tuple[_Pass, _Pass]:
    """Return the two contexts of a checkpointed block: ``context_fn`` of ``torch.utils.checkpoint.checkpoint``.

    In the block's recomputation, fused layers that are not ``recomputed`` take the outputs of its first pass, which
    live until the graph is freed. Others, and the plain path, are computed again.
    """
    results: list[tuple[Computed, list[int]]] = []
    return _Pass(results, True), _Pass(results, False)


def compute_or_take(compute: Callable[[], Computed]) -> Computed:
    """Return what ``compute`` gives, or in the recomputation of a block of ``keep_outputs`` what it gave before."""
    current = _Pass.current()
    return compute() if current is None else current.result(compute)


CHECKPOINTING = {"use_reentrant": False, "context_fn": keep_outputs}
"""What ``gradient_checkpointing_enable`` of a transformers model is to be given for ``adapter.kept_outputs``."""
