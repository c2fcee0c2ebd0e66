"""What a row sees: cached features, or frames for the encoder that runs in the step.

Legend of shapes: B rows, P pictures or videos of a row, K slots of each, D features, F frames, S pixels of a side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dora_core.config import ConfigError
from pipelines.video.config import VisualSection
from pipelines.video.features import FrozenEncoder, load_encoder
from pipelines.video.frames import frames_of
from pipelines.video.visual import Features, find_collection, find_media, media_file, open_features, slots

Seen = np.ndarray | Tensor
"""Of one picture or video: features, float16 ``[L, D]``, or frames, uint8 ``[F, 3, S, S]``."""


@dataclass(frozen=True)
class Look:
    """Reads what the collections of a run hold; may be sent to the processes that prepare batches."""

    section: VisualSection
    folders: dict[str, Path]
    features: dict[str, Features] = field(default_factory=dict)
    preprocessing: Any = None
    """The encoder's, with ``online``."""
    encoder_identity: dict[str, Any] = field(default_factory=dict)
    dim: int = 0
    tokens_per_frame: int = 1

    @property
    def is_online(self) -> bool:
        """Whether frames are read, to be encoded in the step."""
        return self.section.mode == "online"

    def read(self, visual: str) -> Seen:
        """Return what ``<collection>/<name>`` shows. Raises ``VisualError``, ``VideoError`` or ``ImageError``."""
        collection, _, name = visual.partition("/")
        if not self.is_online:
            return self.features[collection].read(name)
        path = media_file(self.folders[collection], name)
        return frames_of(path, self.preprocessing, self.section.seconds_per_frame)

    def nothing(self) -> Seen:
        """Return what a row of padding sees: one vector or frame of zeros."""
        if self.is_online:
            return torch.zeros(1, 3, self.preprocessing.size, self.preprocessing.size, dtype=torch.uint8)
        return np.zeros((1, self.dim), np.float16)

    def also(self, collections: Sequence[str], root: str) -> Look:
        """Return a look at ``collections`` too. Raises ``ValueError`` for missing folders and other sizes."""
        folders = {**self.folders, **_folders(self.section, root, collections)}
        if self.is_online:
            return replace(self, folders=folders)
        features = {**self.features, **{name: open_features(folders[name]) for name in collections}}
        _require_one_encoder(features)
        return replace(self, folders=folders, features=features, dim=_one_size(features))

    def stack(self, seen: Sequence[Sequence[Seen]]) -> dict[str, Tensor]:
        """Return a batch of rows, each of P pictures or videos: what ``Eyes`` makes features of.

        Cached: ``features`` float16 ``[B, P * K, D]`` and ``feature_mask`` ``[B, P * K]``; online: ``frames`` uint8 of
        all rows ``[F, 3, S, S]`` and ``num_frames`` ``[B * P]``. And ``num_pictures``, the number P.
        """
        pictures = [picture for row in seen for picture in row]
        shape = {"num_pictures": torch.tensor(len(seen[0]))}
        if self.is_online:
            return {
                **shape,
                "frames": torch.cat(pictures),
                "num_frames": torch.tensor([len(each) for each in pictures]),
            }
        padded = [slots(picture, self.section.num_slots) for picture in pictures]
        width = self._width(max(num for _, num in padded))
        features = torch.from_numpy(np.stack([values[:width] for values, _ in padded]))
        return {**shape, **self._batch(features, torch.tensor([num for _, num in padded]), len(seen))}

    def encoded(self, encoder: FrozenEncoder, frames: Tensor, num_frames: Tensor, num_rows: int) -> dict[str, Tensor]:
        """Return ``features`` and ``feature_mask`` of frames, as ``stack`` does of cached features."""
        vectors = encoder(frames)
        counts = (num_frames * self.tokens_per_frame).tolist()
        num_slots = self.section.num_slots
        width = self._width(min(max(counts), num_slots))
        rows = []
        for own in vectors.flatten(0, 1).split(counts):
            if len(own) > num_slots:
                own = F.adaptive_max_pool1d(own.T[None].float(), num_slots)[0].T.to(own.dtype)
            rows.append(F.pad(own, (0, 0, 0, width - len(own))))
        present = torch.tensor([min(count, num_slots) for count in counts], device=vectors.device)
        return self._batch(torch.stack(rows), present, num_rows)

    def _width(self, longest: int) -> int:
        """Slots of a batch: all of them where padding is seen, else those that some row fills."""
        return self.section.num_slots if self.section.reference_padding else longest

    def _batch(self, features: Tensor, num_real: Tensor, num_rows: int) -> dict[str, Tensor]:
        mask = torch.arange(features.shape[1], device=features.device) < num_real[:, None]
        if self.section.reference_padding:
            mask = torch.ones_like(mask)
        return {
            "features": features.reshape(num_rows, -1, features.shape[-1]),
            "feature_mask": mask.reshape(num_rows, -1).long(),
        }

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the features, or of what the encoder is and how frames are taken."""
        known: dict[str, Any] = {name: each.sha256 for name, each in self.features.items()}
        if self.is_online:
            known = {"encoder": self.encoder_identity, "seconds": self.section.seconds_per_frame}
        settings = [self.section.num_slots, self.section.reference_padding]
        return hashlib.sha256(json.dumps([known, settings], sort_keys=True).encode()).hexdigest()


def open_look(
    section: VisualSection, root: str, collections: Sequence[str], device: torch.device
) -> tuple[Look, FrozenEncoder | None]:
    """Return how to look at ``collections``, and with ``online`` the encoder, on ``device``.

    Raises ``ValueError`` for folders that are missing, and for features of different sizes.
    """
    root = section.path or root
    if section.mode == "online":
        encoder = load_encoder(section.encoder, section.kind, section.precision, device)
        look = Look(section, {}, {}, encoder.preprocessing, encoder.identity, encoder.dim, encoder.tokens)
        return look.also(collections, root), encoder
    return Look(section, {}).also(collections, root), None


def _folders(section: VisualSection, root: str, collections: Sequence[str]) -> dict[str, Path]:
    find = find_media if section.mode == "online" else find_collection
    return {name: Path(section.folders[name]) if name in section.folders else find(root, name) for name in collections}


def _require_one_encoder(features: dict[str, Features]) -> None:
    known = {name: each.encoder for name, each in features.items() if each.encoder is not None}
    for name, encoder in known.items():
        first, other = next(iter(known.items()))
        if encoder != other:
            differing = ", ".join(key for key in encoder if encoder[key] != other.get(key))
            raise ConfigError(
                f"The features of {first} and of {name} were made by different encoders (they differ in {differing}); "
                "a model sees those of one. Extract both with the same command."
            )


def _one_size(features: dict[str, Features]) -> int:
    dims = {name: each.dim for name, each in features.items()}
    if len(set(dims.values())) > 1:
        sizes = ", ".join(f"{name} {dim}" for name, dim in dims.items())
        raise ConfigError(
            f"The features of the tasks' collections have different sizes ({sizes}); a model sees one size. Train the "
            "tasks apart, or extract all features with one encoder."
        )
    return next(iter(dims.values()))
