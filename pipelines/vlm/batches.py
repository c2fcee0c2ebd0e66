"""Rows with images as the tensors of a forward pass, and what was left out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dora_core.data.collate import IGNORED, num_targets, pad_rows
from dora_core.media.images import ImageTransform
from pipelines.vlm.encode import BadRow, VisionRow

Batch = dict[str, Any]
"""``input_ids``, ``labels``, ``attention_mask`` ``[B, S]`` int64; ``pixel_values`` ``[N, 3, size, size]`` uint8 of the
N images in order, one blank image if there is none; ``counts``, plain numbers; ``bad_rows``, a list of ``BadRow``."""


@dataclass(frozen=True)
class Collate:
    """Make a batch of rows; picklable, for the processes that prepare batches."""

    pad_id: int
    size: int

    def __call__(self, rows: Sequence[VisionRow | BadRow]) -> Batch:
        """Return the batch of the usable rows; without any, a row of padding and a blank image stand in."""
        good = [row for row in rows if isinstance(row, VisionRow)]
        pixels = [image for row in good for image in row.pixels]
        batch: Batch = pad_rows([row.tokens for row in good], self.pad_id)
        # The tower and the projector run on every rank in every step, or ZeRO-3 would wait for those that skip them.
        batch["pixel_values"] = stack_images(pixels, self.size)
        batch["counts"] = {
            "num_targets": num_targets(batch),
            "num_tokens": int(batch["attention_mask"].sum()) if good else 0,
            "num_images": len(pixels),
            "num_rows": len(rows),
            "num_bad": len(rows) - len(good),
            "num_truncated": sum(row.truncated for row in good),
            "num_untrainable": sum(all(label == IGNORED for label in row.tokens.labels[1:]) for row in good),
        }
        batch["bad_rows"] = [row for row in rows if isinstance(row, BadRow)]
        return batch


def stack_images(pixels: Sequence[Tensor], size: int) -> Tensor:
    """Return images, uint8 [3, size, size] each, as one tensor [N, 3, size, size]; one blank image if there is none."""
    return torch.stack(list(pixels) or [torch.zeros(3, size, size, dtype=torch.uint8)])


def to_model(batch: Batch, transform: ImageTransform, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Return the batch's tensors on ``device``, the images normalised in ``dtype``."""
    tensors = {name: value.to(device, non_blocking=True) for name, value in batch.items() if torch.is_tensor(value)}
    tensors["pixel_values"] = transform.normalize(tensors["pixel_values"], dtype, device)
    return tensors
