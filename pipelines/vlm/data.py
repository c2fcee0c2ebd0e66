"""Conversations of several sources as rows of tokens and pixels, made as they are needed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from dora_core.data.mixture import Mixture
from dora_core.data.rows import DataError, hold_out
from dora_core.media.images import ImageError
from pipelines.vlm.config import DataSection, SourceSection
from pipelines.vlm.conversation import RowError
from pipelines.vlm.encode import BadRow, Encoder, VisionRow
from pipelines.vlm.sources import Source, open_source

# Tokenizers work in the processes that prepare batches; their own threads would warn after the fork, and compete.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NUM_PROBED = 16
"""Rows of each source that are read before a run begins."""


class ConversationRows(Sequence[VisionRow | BadRow]):
    """Rows of several sources by place; each is read, decoded and tokenized when it is asked for.

    A row that cannot be used comes as a ``BadRow``, so that a single file does not end a run.
    """

    def __init__(self, sources: Sequence[Source], encoder: Encoder, places: np.ndarray) -> None:
        self._sources = list(sources)
        self._starts = [0, *accumulate(len(source) for source in self._sources)]
        self._encoder = encoder
        self.places = places
        """Numbers of these rows, counted over all sources one after the other."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> VisionRow | BadRow:
        source, place = self._locate(index)
        try:
            row, images = source.read(place)
            return self._encoder.encode(row, images)
        except (RowError, ImageError, DataError, OSError) as error:
            return BadRow(source.where(place), str(error))

    def lengths(self) -> list[int]:
        """Return about how many tokens each row has, without tokenizing: a fourth of its characters, and its images."""
        located = (self._locate(index) for index in range(len(self)))
        per_image = self._encoder.vision.num_tokens
        return [s.num_characters(place) // 4 + per_image * s.num_images(place) for s, place in located]

    def modalities(self) -> list[int]:
        """Return 1 for each row with images and 0 for each without."""
        located = (self._locate(index) for index in range(len(self)))
        return [min(1, source.num_images(place)) for source, place in located]

    def _locate(self, index: int) -> tuple[Source, int]:
        place = int(self.places[index])
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._sources[number], place - self._starts[number]


@dataclass(frozen=True)
class DataReport:
    """What ``load_training_data`` found; rows are read, and bad ones counted, during training."""

    num_rows: int
    num_with_images: int
    num_validation: int
    epoch_size: int
    """Training rows in an epoch, by the sources' weights."""
    dataset_hash: str
    """Over the sources' files and weights and all settings that shape rows or their order; images are not read."""


def load_training_data(
    section: DataSection, encoder: Encoder, seed: int
) -> tuple[ConversationRows, ConversationRows | None, Mixture | None, DataReport]:
    """Return training rows, validation rows, the mixture and the report; the same on every rank.

    There is no mixture where all weights are 1, and no validation where nothing is held out. Raises ``DataError`` for
    sources that cannot be opened, or of which no probed row can be used.
    """
    train, weights = _open(section.train, section)
    held, _ = _open(section.validation, section)
    total = sum(map(len, train))
    kept = np.arange(total)
    validation = None
    if held:
        validation = ConversationRows(held, encoder, np.arange(sum(map(len, held))))
    elif section.num_validation:
        kept, places = (np.array(part) for part in hold_out(range(total), section.num_validation, seed))
        validation = ConversationRows(train, encoder, places)
    rows = ConversationRows(train, encoder, kept)
    _probe(train, encoder)
    _probe(held, encoder)
    bounds = np.searchsorted(kept, list(accumulate(map(len, train))))
    sizes = np.diff([0, *bounds]).tolist()
    mixture = Mixture(sizes, weights, seed) if any(weight != 1 for weight in weights) else None
    shaping = ("template", "max_length", "image_aspect_ratio", "group_by_modality", "num_validation")
    parts = [[source.sha256 for source in sources] for sources in (train, held)]
    settings = [getattr(section, name) for name in shaping]
    digest = hashlib.sha256(json.dumps([parts, weights, settings, encoder.vision.num_tokens]).encode())
    report = DataReport(
        num_rows=len(rows),
        num_with_images=sum(rows.modalities()),
        num_validation=len(validation or ()),
        epoch_size=mixture.epoch_size if mixture else len(rows),
        dataset_hash=digest.hexdigest(),
    )
    return rows, validation, mixture, report


def _open(entries: Sequence[str | SourceSection], section: DataSection) -> tuple[list[Source], list[float]]:
    given = [SourceSection(rows=entry) if isinstance(entry, str) else entry for entry in entries]
    return [open_source(entry.rows, entry.images or section.images) for entry in given], [e.weight for e in given]


def _probe(sources: Sequence[Source], encoder: Encoder) -> None:
    """Read a few rows of each source: a wrong folder of images should not wait for the first steps to be noticed."""
    for source in sources:
        places = np.unique(np.linspace(0, len(source) - 1, NUM_PROBED).astype(int))
        found = [ConversationRows([source], encoder, places)[index] for index in range(len(places))]
        bad = [row for row in found if isinstance(row, BadRow)]
        if len(bad) == len(found):
            raise DataError(
                f"{source.name}: none of {len(found)} rows tried can be used; the first is {bad[0].where}: "
                f"{bad[0].reason} Check data.train and data.images."
            )
