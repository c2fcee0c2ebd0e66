"""One conversation with its images to tokens, labels and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dora_core.data.collate import IGNORED, TokenRow
from dora_core.media.images import ImageTransform, open_image
from pipelines.vlm.config import DataSection
from pipelines.vlm.conversation import IMAGE_MARK, Rendered, RowError, render
from pipelines.vlm.towers import VisionFacts


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
        ids, labels = self._tokens(rendered, len(images))
        num_kept = len(images)
        truncated = len(ids) > self.section.max_length
        if truncated:
            ids, labels, num_kept = self._cut(ids, labels)
        return VisionRow(TokenRow(ids, labels), tuple(map(self.pixels, images[:num_kept])), truncated)

    def pixels(self, image: str | bytes) -> Tensor:
        """Return an image, uint8 [3, size, size]; raises ``ImageError``."""
        return self.transform(open_image(image, self.section.max_image_pixels))

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

    def _tokens(self, rendered: Rendered, num_images: int) -> tuple[list[int], list[int]]:
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
        return ids, labels

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

    What stands before, between and after images is tokenized by itself, as LLaVA does: to LLaMA's tokenizer each is the
    beginning of a text, which it writes with a space. A text with a chat template is tokenized as a whole. An end token
    that the tokenizer adds by itself is left out: the template has written its own.
    """
    pieces = rendered.text.split(IMAGE_MARK) if rendered.adds_special_tokens else [rendered.text]
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for number, piece in enumerate(pieces):
        if number:
            ids.append(tokenizer.convert_tokens_to_ids(IMAGE_MARK))
            spans.append((start, start + len(IMAGE_MARK)))
            start += len(IMAGE_MARK)
        encoding = tokenizer(
            piece,
            add_special_tokens=rendered.adds_special_tokens and number == 0,
            return_offsets_mapping=True,
            truncation=False,
            verbose=False,
        )
        ids += encoding["input_ids"]
        spans += [(start + begin, start + end) for begin, end in encoding["offset_mapping"]]
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and spans[-1][0] == spans[-1][1]:
            ids.pop(), spans.pop()
        start += len(piece)
    return ids, spans
