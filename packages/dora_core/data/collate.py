"""Tokenized rows to the tensors of one forward pass: padded, or packed one after the other.

Legend of shapes: B rows or packs, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch

from dora_core.config import require

IGNORED = -100
"""The label of a token that carries no loss."""

PACKING_WINDOW = 256
WIDTH_MULTIPLE = 8
"""Tokens that the width of a batch is a multiple of."""

Batch = dict[str, torch.Tensor]
"""``input_ids`` and ``labels`` ``[B, S]`` int64, with ``attention_mask`` (padded) or ``position_ids`` (packed)."""


@dataclass(frozen=True)
class TokenRow:
    """One row: token ids, and for each token its id again or -100 for no loss (not yet shifted)."""

    input_ids: list[int]
    labels: list[int]

    def __post_init__(self) -> None:
        if not self.input_ids or len(self.input_ids) != len(self.labels):
            raise ValueError(
                f"A row has {len(self.input_ids)} tokens and {len(self.labels)} labels; it must have one label per "
                "token and at least one token. Label tokens without loss with -100."
            )


def pad_rows(rows: Sequence[TokenRow], pad_id: int, side: str = "right", multiple_of: int = WIDTH_MULTIPLE) -> Batch:
    """Return ``input_ids``, ``attention_mask`` and ``labels`` ``[B, S]``; S is a multiple of ``multiple_of``.

    The first token of a row has no label: nothing precedes it but, on the left, padding that must not learn it.
    No rows give one row of padding without labels, so that every rank runs the same forward passes.
    """
    require(side in ("left", "right"), "side", side, "left or right")
    rows = rows or [_padding_row(pad_id)]
    width = _round_up(max(len(row.input_ids) for row in rows), multiple_of)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORED)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        start = width - length if side == "left" else 0
        input_ids[index, start : start + length] = torch.tensor(row.input_ids)
        labels[index, start + 1 : start + length] = torch.tensor(row.labels[1:], dtype=torch.long)
        attention_mask[index, start : start + length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def make_packs(rows: Sequence[TokenRow], pack_length: int, seed: int | None = None) -> list[list[TokenRow]]:
    """Distribute rows over packs of at most ``pack_length`` tokens; every row is in exactly one.

    First fit, longest first, within windows of 256 rows, which are drawn at random by ``seed`` if given: a pack then
    holds a random sample of the rows, and packing a large data set takes time in proportion to its size.
    Raises ``ValueError`` for a row longer than ``pack_length``.
    """
    for row in rows:
        require(
            len(row.input_ids) <= pack_length,
            "A row's length",
            len(row.input_ids),
            f"at most pack_length ({pack_length})",
            "Raise data.pack_length or lower data.cutoff_len.",
        )
    order = range(len(rows)) if seed is None else numpy.random.default_rng([seed, len(rows)]).permutation(len(rows))
    packs: list[list[TokenRow]] = []
    for start in range(0, len(rows), PACKING_WINDOW):
        packs += _first_fit_decreasing([rows[index] for index in order[start : start + PACKING_WINDOW]], pack_length)
    return packs


def pad_packs(packs: Sequence[Sequence[TokenRow]], pad_id: int, multiple_of: int = WIDTH_MULTIPLE) -> Batch:
    """Return ``input_ids``, ``position_ids`` and ``labels`` ``[B, S]``, one pack a line, one row after the other.

    S is the longest pack, rounded up. ``position_ids`` restart at 0 with each row and with the padding at the end; the
    first token of a row has no label, so no row predicts the next. There is no ``attention_mask``: transformers (5.17
    or later) confines attention to rows by the restarts, and only without a mask and with ``use_cache=False``. Its
    flash attention reads restarts in a batch of one sequence only: give it ``flatten_packs`` of the batch.

    No packs give one of padding without labels.
    """
    packs = packs or [[_padding_row(pad_id)]]
    width = _round_up(max(sum(len(row.input_ids) for row in pack) for pack in packs), multiple_of)
    input_ids = torch.full((len(packs), width), pad_id, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORED)
    position_ids = torch.zeros_like(input_ids)
    for index, pack in enumerate(packs):
        start = 0
        for row in pack:
            stop = start + len(row.input_ids)
            input_ids[index, start:stop] = torch.tensor(row.input_ids)
            labels[index, start + 1 : stop] = torch.tensor(row.labels[1:], dtype=torch.long)
            position_ids[index, start:stop] = torch.arange(stop - start)
            start = stop
        position_ids[index, start:] = torch.arange(width - start)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def flatten_packs(batch: Batch) -> Batch:
    """Return a batch of ``pad_packs`` as one sequence ``[1, B x S]``, as flash attention needs it.

    Attention and loss stay the same: positions restart and labels are -100 where one pack follows another.
    """
    return {name: tensor.reshape(1, -1) for name, tensor in batch.items()}


def num_targets(batch: Batch) -> int:
    """Return how many labels carry loss after the model's shift by one token."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def num_tokens(batch: Batch, pad_id: int) -> int:
    """Return how many tokens of a batch are not padding; in packs, how many are not the padding token."""
    mask = batch.get("attention_mask")
    return int((batch["input_ids"] != pad_id).sum() if mask is None else mask.sum())


def _first_fit_decreasing(rows: Sequence[TokenRow], pack_length: int) -> list[list[TokenRow]]:
    packs: list[list[TokenRow]] = []
    free: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):  # sorted() keeps the order of equal lengths
        length = len(row.input_ids)
        place = next((index for index, room in enumerate(free) if room >= length), None)
        if place is None:
            packs.append([])
            free.append(pack_length)
            place = len(packs) - 1
        packs[place].append(row)
        free[place] -= length
    return packs


def _padding_row(pad_id: int) -> TokenRow:
    return TokenRow([pad_id] * 8, [IGNORED] * 8)


def _round_up(value: int, multiple_of: int) -> int:
    return -(-value // multiple_of) * multiple_of
