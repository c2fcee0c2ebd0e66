"""Where conversations and their images lie: JSON beside a folder of images, or WebDataset shards."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from dora_core.data.rows import DataError, read_source
from dora_core.data.shards import ShardSet, shard_files
from dora_core.data.store import RowStore
from pipelines.vlm.conversation import RowError, images_of

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAX_CHARACTERS = 1 << 30


class Source(Protocol):
    """Rows that are read one at a time; picklable, for the processes that prepare batches."""

    name: str
    sha256: str

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def read(self, place: int) -> tuple[dict[str, Any], list[str | bytes]]:
        """Return a row and its images: paths, or encoded bytes. Raises ``RowError`` if the row is malformed."""
        ...

    def where(self, place: int) -> str:
        """Return what to call a row in a message."""
        ...

    def num_images(self, place: int) -> int:
        """Return how many images a row says it has."""
        ...

    def num_characters(self, place: int) -> int:
        """Return about how many characters a row's turns have."""
        ...


def open_source(rows: str, images: str | None) -> Source:
    """Return the data set ``rows``: shards, or JSON whose image paths start at ``images``."""
    path = Path(rows)
    if rows.endswith(".tar") or (path.is_dir() and any(path.glob("*.tar"))):
        return ShardSource(rows)
    return JsonSource(rows, images)


class JsonSource:
    """Conversations in a JSON list or JSON lines; images lie in a folder."""

    def __init__(self, rows: str, images: str | None) -> None:
        read = read_source(rows)
        self.name = rows
        self._images = None if images is None else Path(images)
        self._counts = np.array([_count_images(row) for row in read], dtype=np.int32)
        self._characters = np.array([_count_characters(row) for row in read], dtype=np.int32)
        self._store = RowStore(read)
        self.sha256 = self._store.sha256
        if self._counts.any() and self._images is None:
            raise DataError(f"{rows} names images, and nothing says where they lie. Set data.images to their folder.")

    def __len__(self) -> int:
        return len(self._store)

    def read(self, place: int) -> tuple[dict[str, Any], list[str | bytes]]:
        """Return a row and the paths of its images, which must stay below the folder of images."""
        row = self._store[place]
        return row, [self._path(name) for name in images_of(row)]

    def where(self, place: int) -> str:
        """Return the file, the row's number and its id."""
        return f"{self.name}, row {place + 1}, id {self._store[place].get('id')!r}"

    def num_images(self, place: int) -> int:
        """Return how many images the row names."""
        return int(self._counts[place])

    def num_characters(self, place: int) -> int:
        """Return the length of the row's turns."""
        return int(self._characters[place])

    def _path(self, name: str) -> str:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise RowError(f"The image path {name!r} leaves the folder of images. Make it relative to data.images.")
        return str(self._images / parts)


class ShardSource:
    """Conversations in WebDataset shards: ``<key>.json`` beside ``<key>.jpg``, or alone for text."""

    def __init__(self, pattern: str) -> None:
        self.name = pattern
        self._shards = ShardSet(shard_files(pattern))
        self.sha256 = self._shards.sha256
        places = range(len(self._shards))
        self._counts = np.array([len(self._image_members(place)) for place in places], dtype=np.int32)
        self._characters = np.array([self._shards.members(place).get("json", 0) for place in places], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, place: int) -> tuple[dict[str, Any], list[str | bytes]]:
        """Return a row and its image's bytes. What ``image`` says in the row does not matter."""
        members = self._shards.members(place)
        if "json" not in members:
            raise RowError(f"The sample has the members {sorted(members)}; it must have json. Write the shard again.")
        try:
            row = json.loads(self._shards.read(place, "json"))
        except ValueError as error:
            raise RowError(f"The sample's json cannot be read: {error}. Write the shard again.") from None
        if not isinstance(row, dict):
            raise RowError(f"The sample's json is a {type(row).__name__}; it must be an object. Write the shard again.")
        return row, [self._shards.read(place, suffix) for suffix in self._image_members(place)]

    def where(self, place: int) -> str:
        """Return the shard and the key."""
        return self._shards.key(place)

    def num_images(self, place: int) -> int:
        """Return how many image members the sample has."""
        return int(self._counts[place])

    def num_characters(self, place: int) -> int:
        """Return the size of the sample's json."""
        return int(self._characters[place])

    def _image_members(self, place: int) -> list[str]:
        """Return the image members in order: ``jpg``, or ``0.jpg``, ``1.jpg`` … where there are several."""
        numbered = (
            (int(number or 0), name)
            for name in self._shards.members(place)
            for number, _, suffix in [name.rpartition(".")]
            if suffix in IMAGE_SUFFIXES and (number == "" or number.isdigit())
        )
        return [name for _, name in sorted(numbered)]


def _count_images(row: dict[str, Any]) -> int:
    try:
        return len(images_of(row))
    except RowError:  # said when the row is read
        return 0


def _count_characters(row: dict[str, Any]) -> int:
    turns = row.get("conversations")
    values = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return min(MAX_CHARACTERS, sum(len(value) for value in values if isinstance(value, str)))
