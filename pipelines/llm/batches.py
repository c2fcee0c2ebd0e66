"""What the batch sizes count, rows or packs of rows, and how some of them become the tensors of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dora_core.data.collate import Batch, TokenRow, flatten_packs, make_packs, pad_packs, pad_rows
from pipelines.llm.config import DataSection


def make_items(rows: list[TokenRow], section: DataSection, seed: int) -> list:
    """Return what the batch sizes count: the rows, or the packs made of them."""
    return make_packs(rows, section.pack_length or section.cutoff_len, seed) if section.packing else rows


def make_collate(section: DataSection, pad_id: int, attention: str) -> Callable[[list], Batch]:
    """Return the function that makes a batch of rows or packs."""
    if not section.packing:
        return partial(pad_rows, pad_id=pad_id)
    # flash attention tells rows apart in one long sequence only
    return partial(_flat_packs if attention == "flash_attention_2" else pad_packs, pad_id=pad_id)


def _flat_packs(packs: list, pad_id: int) -> Batch:
    return flatten_packs(pad_packs(packs, pad_id))


def move(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return the batch on ``device``."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
