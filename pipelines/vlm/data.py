"""Conversations and their images to tokens, labels and pixels, row by row as they are needed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dora_core.data.collate import IGNORED, TokenRow
from dora_core.data.mixture import Mixture
from dora_core.data.rows import DataError, hold_out
from pipelines.vlm.config import DataSection, SourceSection
from pipelines.vlm.conversation import IMAGE_MARK, Rendered, RowError, render
from pipelines.vlm.images import ImageError, ImageTransform, open_image
from pipelines.vlm.sources import Source, open_source
from pipelines.vlm.towers import VisionFacts

# Tokenizers work in the processes that prepare batches; their own threads would warn after the fork, and compete.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NUM_PROBED = 16
"""Rows of each source that are read before a run begins."""


@dataclass(frozen=True)
class VisionRow:
    """One row: its tokens, image tokens in place, and its images."""

    tokens: TokenRow
    pixels: tuple[Tensor, ...]
    """uint8 [3, size, size] each, in the order of their tokens."""
    truncated: bool


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    where: str
    reason: str


@dataclass(frozen=True)
class Encoder:
    """What makes tokens and pixels of a row."""

    tokenizer: PreTrainedTokenizerBase
    vision: VisionFacts
    section: DataSection

    def encode(self, row: dict[str, Any], images: Sequence[str | bytes]) -> VisionRow:
        """Return the row's tokens and pixels. Raises ``RowError`` or ``ImageError`` if it cannot be used."""
        rendered = render(row, len(images), self.section.template, self.tokenizer)
        ids, labels, num_kept = self._tokens(rendered, len(images))
        truncated = len(ids) > self.section.max_length
        if truncated:
            ids, labels, num_kept = self._cut(ids, labels)
        transform = self.transform
        pixels = tuple(transform(open_image(image, self.section.max_image_pixels)) for image in images[:num_kept])
        return VisionRow(TokenRow(ids, labels), pixels, truncated)

    @property
    def transform(self) -> ImageTransform:
        """From pictures to the tower's pixels."""
        vision = self.vision
        return ImageTransform(
            size=vision.size,
            mean=vision.mean,
            std=vision.std,
            aspect=self.section.image_aspect_ratio,
            resample=vision.resample,
        )

    @property
    def image_id(self) -> int:
        """The id of the image token."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_MARK)

    def _tokens(self, rendered: Rendered, num_images: int) -> tuple[list[int], list[int], int]:
        found, spans = tokenize(self.tokenizer, rendered)
        image_id, per_image = self.image_id, self.vision.num_tokens
        if found.count(image_id) != num_images:
            raise RowError(
                f"The text has {found.count(image_id)} image tokens for {num_images} images; each needs one. Remove "
                f"{IMAGE_MARK} from the row's other text."
            )
        ids: list[int] = []
        labels: list[int] = []
        for token, (start, end) in zip(found, spans, strict=True):
            has_loss = any(start < stop and end > begin for begin, stop in rendered.answers)
            count = per_image if token == image_id else 1
            ids += [token] * count
            labels += [token if has_loss and token != image_id else IGNORED] * count
        return ids, labels, num_images

    def _cut(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int], int]:
        """Cut to ``max_length`` tokens, before an image that would be cut; say how many images are left."""
        end = self.section.max_length
        whole, left_over = divmod(ids[:end].count(self.image_id), self.vision.num_tokens)
        if left_over:
            end = [place for place, token in enumerate(ids) if token == self.image_id][whole * self.vision.num_tokens]
        if end == 0:
            raise RowError(
                f"The first image alone has more than {self.section.max_length} tokens. Raise data.max_length."
            )
        return ids[:end], labels[:end], whole


def tokenize(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the text's tokens, ``<image>`` as one, and the span of characters that each covers.

    An end token that the tokenizer adds by itself is left out: the template has written its own.
    """
    encoding = tokenizer(
        rendered.text,
        add_special_tokens=rendered.adds_special_tokens,
        return_offsets_mapping=True,
        truncation=False,
        verbose=False,
    )
    ids, spans = list(encoding["input_ids"]), [tuple(span) for span in encoding["offset_mapping"]]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and spans[-1][0] == spans[-1][1]:
        ids.pop(), spans.pop()
    return ids, spans


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
    """Over the sources' files, weights and order; the images themselves are not read."""


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
    digest = hashlib.sha256()
    for sources in (train, held):
        digest.update(json.dumps([[source.sha256 for source in sources], weights]).encode())
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
