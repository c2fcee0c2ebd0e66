"""Rows of one task as the tensors of a forward pass, and what was left out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dora_core.data.collate import IGNORED, TokenRow, pad_rows
from pipelines.video.data import BadRow, TaskRow
from pipelines.video.features import FrozenEncoder
from pipelines.video.looking import Look
from pipelines.video.task import Task

Batch = dict[str, Any]
"""``input_ids``, ``attention_mask`` ``[B, S]``, ``decoder_input_ids``, ``labels`` ``[B, T]`` int64, ``label_weights``
``[B, T]`` fp32, what ``Look.stack`` gives; ``counts``, plain numbers; ``bad_rows``, a list of ``BadRow``."""


@dataclass(frozen=True)
class Collate:
    """Make a batch of rows; picklable, for the processes that prepare batches."""

    tasks: Sequence[Task]
    look: Look
    pad_id: int
    start_id: int

    def __call__(self, rows: Sequence[TaskRow | BadRow]) -> Batch:
        """Return the batch of the usable rows; without any, a row of padding stands in.

        ``counts["loss_units"]`` is what the loss of these rows is to be divided by, together with those of the other
        batches of the step: the number of rows, or of target tokens, as the task says.
        """
        good = [row for row in rows if isinstance(row, TaskRow)]
        task = self.tasks[good[0].task] if good else None
        texts = pad_rows([TokenRow(row.text_ids, row.text_ids) for row in good], self.pad_id)
        batch: Batch = {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"]}
        batch |= self._targets(good, task)
        batch |= self.look.stack([row.seen for row in good] or [[self.look.nothing()]])
        num_targets = int((batch["labels"] != IGNORED).sum())
        batch["counts"] = {
            "loss_units": num_targets if task is not None and task.loss_per == "token" else len(good),
            "num_targets": num_targets,
            "num_tokens": int(batch["attention_mask"].sum()) if good else 0,
            "num_frames": int(batch["num_frames"].sum()) if good and "num_frames" in batch else 0,
            "num_rows": len(rows),
            "num_bad": len(rows) - len(good),
            "num_truncated": sum(row.truncated for row in good),
        }
        batch["bad_rows"] = [row for row in rows if isinstance(row, BadRow)]
        return batch

    def _targets(self, rows: Sequence[TaskRow], task: Task | None) -> dict[str, Tensor]:
        shape = (max(1, len(rows)), max((len(row.target_ids) for row in rows), default=1))
        labels = torch.full(shape, IGNORED)
        weights = torch.zeros(shape)
        for place, row in enumerate(rows):
            length = len(row.target_ids)
            labels[place, :length] = torch.tensor(row.target_ids)
            weights[place, :length] = row.weight / (length if task.loss_per == "row" else 1)
        inputs = labels.roll(1, 1)
        inputs[:, 0] = self.start_id
        inputs[inputs == IGNORED] = self.pad_id
        return {"labels": labels, "label_weights": weights, "decoder_input_ids": inputs}


def to_model(batch: Batch, look: Look, encoder: FrozenEncoder | None, device: torch.device) -> dict[str, Any]:
    """Return the batch's tensors on ``device``, frames encoded; ``num_pictures`` is a number."""
    inputs = {name: value.to(device, non_blocking=True) for name, value in batch.items() if torch.is_tensor(value)}
    inputs["num_pictures"] = int(batch["num_pictures"])
    if encoder is not None:
        num_rows = len(batch["num_frames"]) // inputs["num_pictures"]
        frames = inputs.pop("frames")
        inputs |= look.encoded(encoder, frames, batch["num_frames"], num_rows)
        del inputs["num_frames"]
    return inputs
