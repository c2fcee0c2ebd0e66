"""Outputs that activation checkpointing keeps: a layer's product that the recomputation then need not do again.

The last projection of a transformer's block is recomputed because a layer saves what its backward pass needs after it
has computed, for the gradient of its magnitude at most; nothing else in the block needs its output.
``torch.utils.checkpoint`` has such a choice too (selective checkpointing), by operator and with a Python call for each
that a block runs; here it is a layer's own, and others run as they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Recomputation = Literal["compute", "keep", "offload"]
"""What the recomputation of a checkpointed block does about a layer: compute it again, or take what the first pass
kept, on the device or in the host's memory."""


class Computed(NamedTuple):
    """What the forward pass of layers that share their input computes."""

    outputs: Sequence[Tensor]
    """[..., out] of each."""
    kept: Sequence[Tensor | None]
    """Of each what the magnitude's gradient needs, if any: the output itself, or the base product."""
    hidden: Tensor | None
    """drop(x) A^T [T, sum of ranks], if it was needed."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Computed:
        """Return it with ``function`` of each tensor."""
        outputs = [function(y) for y in self.outputs]
        pairs = zip(self.outputs, self.kept, outputs, strict=True)
        kept = [new if each is y else each if each is None else function(each) for y, each, new in pairs]
        return Computed(outputs, kept, None if self.hidden is None else function(self.hidden))


class _Kept:
    """What was computed once; aliases of it, which autograd has not seen, go in and out."""

    def __init__(self, result: Computed, offload: bool) -> None:
        self._counters = [_counter(y) for y in result.outputs]
        self._versions = [counter._version for counter in self._counters]
        self._device = result.outputs[0].device if offload and result.outputs[0].is_cuda else None
        """Where to bring it from the host's memory, if it is there."""
        self._result = result.map(Tensor.detach if self._device is None else _to_host)
        self._fetched: Computed | None = None

    def fetch(self) -> None:
        """Begin to bring it to where it is taken."""
        self._fetched = self._result
        if self._device is not None:
            _copying(self._device).wait_stream(torch.cuda.current_stream(self._device))
            self._fetched = self._result.map(self._to_device)

    def take(self) -> Computed | None:
        """Return it, or nothing if the model wrote to an output."""
        result, self._fetched = self._fetched, None
        if [counter._version for counter in self._counters] != self._versions:
            return None
        if self._device is not None:
            torch.cuda.current_stream(self._device).wait_stream(_copying(self._device))
        return result.map(Tensor.detach)

    def drop(self) -> None:
        """Forget what was fetched and not taken."""
        self._fetched = None

    def _to_device(self, kept: Tensor) -> Tensor:
        y = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        with torch.cuda.stream(_copying(self._device)):
            y.copy_(kept, non_blocking=True)
        y.record_stream(_copying(self._device))
        return y


def _to_host(y: Tensor) -> Tensor:
    copying = _copying(y.device)
    copying.wait_stream(torch.cuda.current_stream(y.device))
    kept = torch.empty(y.shape, dtype=y.dtype, pin_memory=True)
    with torch.cuda.stream(copying):
        kept.copy_(y.detach(), non_blocking=True)
    y.record_stream(copying)
    return kept


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _counter(y: Tensor) -> Tensor:
    """Return a tensor without memory whose ``_version`` is that of y."""
    alias = y.detach()
    alias.data = y.new_empty(0)
    return alias


class _Pass:
    """A pass through a checkpointed block: the first one keeps, the recomputation takes in the same order."""

    _of_thread = threading.local()  # the recomputation runs in a thread of autograd's

    def __init__(self, results: list[_Kept], is_first: bool) -> None:
        self._results, self._is_first = results, is_first

    def __enter__(self) -> None:
        self._outer, self._position = self.current(), 0
        try:
            for kept in [] if self._is_first else self._results:
                kept.fetch()
        except BaseException:  # no memory: who tries again with less must find nothing of this pass
            self.__exit__()
            raise
        self._of_thread.current = self

    def __exit__(self, *_: object) -> None:
        self._of_thread.current = self._outer
        for kept in self._results:
            kept.drop()

    @classmethod
    def current(cls) -> _Pass | None:
        return getattr(cls._of_thread, "current", None)

    def result(self, compute: Callable[[], Computed], offload: bool) -> Computed:
        if self._is_first:
            result = compute()
            self._results.append(_Kept(result, offload))
            return result
        self._position += 1
        return self._results[self._position - 1].take() or compute()


def keep_outputs() -> tuple[_Pass, _Pass]:
    """Return the two contexts of a checkpointed block: ``context_fn`` of ``torch.utils.checkpoint.checkpoint``.

    In the block's recomputation, fused layers whose ``recomputation`` is to keep or to offload take the outputs of its
    first pass, which live until the graph is freed. Others, and the plain path, are computed again.
    """
    results: list[_Kept] = []
    return _Pass(results, True), _Pass(results, False)


def compute_or_take(compute: Callable[[], Computed], how: Recomputation) -> Computed:
    """Return what ``compute`` gives, or in the recomputation of a block of ``keep_outputs`` what it gave before."""
    current = None if how == "compute" else _Pass.current()
    return compute() if current is None else current.result(compute, how == "offload")
