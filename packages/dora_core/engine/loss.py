"""The loss of every pipeline: cross-entropy in fp32, summed, from logits or straight from what they are made of.

Legend of shapes: B rows, T places of a row that logits are asked for, N of the B T places that have a label, H width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
MAX_CHUNK_ELEMENTS = 1 << 26
"""Logits that exist at a time, 128 MiB in bf16: large enough to keep a GPU's matrix units busy."""

LinearLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None], Tensor]
"""Of hidden [N, H], weight [V, H], bias [V], labels [N] and their weights [N]: the weighted cross-entropy, summed."""


def summed_cross_entropy(
    engine: Any, inputs: Mapping[str, Any], labels: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy in fp32 *summed* over the labels ``[B, T]`` that are not -100.

    ``labels`` belong to the places of the logits that ``engine``, an ``Engine`` or a model, gives for ``inputs``; each
    one's loss is multiplied by its weight, where there are ``weights`` ``[B, T]``. With a ``LossHead`` no logits
    ``[B, T, V]`` are made. Every rank must call it.
    """
    head = getattr(engine, "loss_head", None)
    if head is not None:
        return head(engine, inputs, labels, weights)
    logits = engine(**inputs, use_cache=False).logits.flatten(0, 1).float()
    if weights is None:
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    losses = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
    return (losses * weights.flatten()).sum()


def rows_per_chunk(num_rows: int, vocabulary: int) -> int:
    """Return how many rows of logits are made at a time: a quarter of ``num_rows`` at most, or a single one."""
    return max(1, min(-(-num_rows // 4), MAX_CHUNK_ELEMENTS // vocabulary))


class LossHead:
    """A model's output layer, which answers with a loss in place of logits while a loss is what it is asked for.

    The loss is computed in the layer's own call, because ZeRO-3 has its weight whole there and nowhere else, tied or
    not; and it leaves the model as its ``logits``, because DeepSpeed prepares the backward pass of what its engine
    returns. ``model`` must return its output layer's answer as it is, or add ``final_logits_bias`` to it, as BART.

    ``linear_loss`` computes the loss of a plain ``nn.Linear``, trained or frozen. Without it, and for an adapted
    layer, logits are made in chunks, in the backward pass once more.
    """

    def __init__(self, model: nn.Module, linear_loss: LinearLoss | None = None) -> None:
        self.model = model
        self.layer: nn.Module = model.get_output_embeddings()
        self.linear_loss = linear_loss if type(self.layer) is nn.Linear else None
        added = getattr(model, "final_logits_bias", None)
        self._adds_bias = added is not None and bool(added.any())
        self._bias: Tensor | None = None
        self._asked: tuple[Tensor, Tensor | None] | None = None
        self.layer.forward = self._forward

    def __call__(self, engine: Any, inputs: Mapping[str, Any], labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return what ``summed_cross_entropy`` says."""
        with self._answering(labels, weights):
            return engine(**inputs, use_cache=False).logits.reshape(())

    @contextmanager
    def _answering(self, labels: Tensor, weights: Tensor | None) -> Iterator[None]:
        added = getattr(self.model, "final_logits_bias", None)
        self._asked = labels, weights
        if added is not None:  # it is in the loss already
            self._bias = added[0] if self._adds_bias else None
            self.model.final_logits_bias = added.new_zeros(1)
        try:
            yield
        finally:
            self._asked = None
            if added is not None:
                self.model.final_logits_bias = added

    def _forward(self, hidden: Tensor) -> Tensor:
        if self._asked is None:
            return type(self.layer).forward(self.layer, hidden)
        labels, weights = self._asked
        places = (labels.flatten() != IGNORED).nonzero().squeeze(1)
        hidden, labels = hidden.flatten(0, -2).index_select(0, places), labels.flatten()[places]
        weights = None if weights is None else weights.flatten()[places]
        if self.linear_loss is None or not len(places):
            loss = self._in_chunks(hidden, labels, weights)
        else:
            biases = [bias for bias in (self.layer.bias, self._bias) if bias is not None]
            loss = self.linear_loss(hidden, self.layer.weight, sum(biases) if biases else None, labels, weights)
        return loss.reshape(1, 1, 1)

    def _in_chunks(self, hidden: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        weights = torch.ones(labels.shape, device=labels.device) if weights is None else weights
        num_rows = rows_per_chunk(len(labels), self.layer.out_features)
        chunks = zip(*(each.split(num_rows) for each in (hidden, labels, weights)), strict=True)
        return torch.stack([checkpoint(self._plain, *chunk, use_reentrant=False) for chunk in chunks]).sum()

    def _plain(self, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        logits = type(self.layer).forward(self.layer, hidden).float()
        logits = logits if self._bias is None else logits + self._bias
        return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
