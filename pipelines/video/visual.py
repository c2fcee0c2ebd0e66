"""Where the features, pictures and videos of a collection are, and features by name.

Importing this module must stay cheap (no torch). Legend of shapes: L vectors of a picture or video.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.video.feature_files import (
    MANIFEST,
    PLAN,
    NameTable,
    VisualError,
    adaptive_max,
    names_in,
    open_shards,
    read_h5,
    read_npz,
    read_sample,
    sha256_of_files,
    sha256_of_shards,
    unusable,
)

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

_KINDS = {MANIFEST: "shards", PLAN: "shards", ".npz": "npz", ".h5": "h5"}
_NUM_TRIED = 10


class Features:
    """The features of one collection by name, made by ``open_features``; it can be forked and pickled.

    ``folder`` is where they are, ``dim`` the length of a vector, and ``encoder`` what made them, as the encoder's
    ``identity`` has it, or None where that was not written down.
    """

    def __init__(
        self,
        folder: Path,
        names: list[str],
        read: Callable[[str, int], np.ndarray],
        sha256: Callable[[], str],
        dim: int | None = None,
        encoder: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.encoder = encoder
        self._names = NameTable(names)
        self._read = read
        self._sha256 = sha256
        self.dim = dim or self._dim_of_first(names[:_NUM_TRIED])

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return self._names.find(name) is not None

    def read(self, name: str) -> np.ndarray:
        """Return float16 ``[L, dim]``. Raises ``VisualError`` if there is no such name or its file cannot be used."""
        values = self._checked(name)
        if values.shape[1] != self.dim:
            raise unusable(
                f"{name!r} of {self.folder}", f"its vectors have {values.shape[1]} numbers and others {self.dim}"
            )
        return values

    @functools.cached_property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of what identifies them: of shards manifest and index, of files their names and sizes."""
        return self._sha256()

    def _checked(self, name: str) -> np.ndarray:
        place = self._names.find(name)
        if place is None:
            close = self._names.close_to(name)
            raise VisualError(
                f"{self.folder} has no features of {name!r}; it has those of {len(self):,} names"
                f"{', such as ' + ' or '.join(close) if close else ''}. Extract them or remove the rows that need them."
            )
        values = self._read(name, place)
        what = f"{name!r} of {self.folder}"
        if values.ndim != 2 or 0 in values.shape or values.dtype.kind != "f":
            raise unusable(what, f"it is {values.dtype} of the shape {list(values.shape)}")
        with np.errstate(over="ignore"):
            values = values.astype(np.float16, copy=False)
        if not np.isfinite(values.astype(np.float32)).all():  # of halves it would take far longer
            raise unusable(what, "it holds NaN, infinity or numbers too large for float16")
        return values

    def _dim_of_first(self, names: list[str]) -> int:
        problem = None
        for name in names:  # one damaged file costs the rows that need it, not the run
            try:
                return self._checked(name).shape[1]
            except VisualError as error:
                problem = problem or error
        raise problem


def open_features(folder: str | Path) -> Features:
    """Return the features in ``folder``, recognised by what it holds.

    That is the shards of ``extract.py`` with their ``manifest.json``; or ``<name>.npz`` with an array ``features`` [L,
    dim], as VALUE has them; or ``<name>.h5`` with ``<name>/features``, as VL-Adapter has them: [49, dim] of a 7 x 7
    grid, pooled to [36, dim] when read, or [36, dim]. Raises ``VisualError`` for anything else.
    """
    folder = Path(os.path.abspath(folder))
    kinds = set(_kinds(folder))
    if len(kinds) != 1:
        raise VisualError(
            f"{folder} holds {' and '.join(sorted(kinds)) or 'no features'}; a folder of features holds either shards "
            f"with {MANIFEST}, or <name>.npz, or <name>.h5. Name another folder, or extract features into it."
        )
    kind = kinds.pop()
    if kind == "shards":
        shards, manifest = open_shards(folder)
        return Features(
            folder,
            names_in(shards),
            functools.partial(read_sample, shards),
            functools.partial(sha256_of_shards, folder, shards),
            manifest["dim"],
            manifest.get("encoder"),
        )
    suffix = f".{kind}"
    names = sorted(file.removesuffix(suffix) for file in _files(folder) if file.endswith(suffix))
    read = functools.partial(read_npz if kind == "npz" else read_h5, folder)
    return Features(folder, names, read, functools.partial(sha256_of_files, folder, names, suffix))


def find_collection(root: str | Path, collection: str) -> Path:
    """Return the folder of a collection's features: below ``root`` itself, or where VL-Adapter or VALUE has it."""
    places = (
        collection,
        f"{collection}/clip_features/data_clip_RN101_att",
        f"video/vis_features/{collection}/clip-vit",
    )
    return _first(Path(root), places, lambda folder: any(_kinds(folder)), f"features of {collection}")


def find_media(root: str | Path, collection: str) -> Path:
    """Return the folder of a collection's pictures or videos."""
    places = (f"video/videos/{collection}", f"images/{collection}", f"{collection}/images", collection)
    return _first(Path(root), places, Path.is_dir, f"pictures or videos of {collection}")


def slots(features: np.ndarray, num_slots: int) -> tuple[np.ndarray, int]:
    """Return ``[num_slots, dim]`` of ``features`` [L, dim], and how many of them are real.

    Fewer are padded with zeros at the end; more are max-pooled over the windows of torch's ``AdaptiveMaxPool1d``.
    """
    if len(features) >= num_slots:
        return adaptive_max(features, num_slots), num_slots
    padding = np.zeros((num_slots - len(features), features.shape[1]), features.dtype)
    return np.concatenate([features, padding]), len(features)


def media_file(folder: str | Path, name: str) -> Path:
    """Return the one picture or video ``<name>.<suffix>`` of a folder; none or several is a ``VisualError``."""
    suffixes = VIDEO_SUFFIXES + IMAGE_SUFFIXES
    spellings = ((f"{name}{suffix}", f"{name}{suffix.upper()}") for suffix in suffixes)
    present = (next((file for file in both if Path(folder, file).is_file()), None) for both in spellings)
    found = [file for file in present if file]
    if len(found) != 1:
        raise VisualError(
            f"{folder} has {' and '.join(found) or 'no file'} for {name!r}; it must have one, {name!r} with one of "
            f"{', '.join(suffixes)}. Put it there, remove the others, or remove the rows that need it."
        )
    return Path(folder, found[0])


def media_names(folder: str | Path) -> list[str]:
    """Return the names of all pictures and videos below a folder, sorted: their paths in it without the suffix.

    Hidden files and folders are left out, and so is what is behind a link to a folder.
    """
    found: set[str] = set()
    for where, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        paths = (Path(where, file) for file in files if not file.startswith("."))
        media = (path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES + IMAGE_SUFFIXES)
        found.update(path.relative_to(folder).with_suffix("").as_posix() for path in media)
    return sorted(found)


def _kinds(folder: Path) -> Iterator[str]:
    """Yield for each file of features which kind it is."""
    for file in _files(folder):
        kind = _KINDS.get(file) or _KINDS.get(os.path.splitext(file)[1])
        if kind:
            yield kind


def _files(folder: Path) -> Iterator[str]:
    if folder.is_dir():
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries if not entry.name.startswith("."))


def _first(root: Path, places: tuple[str, ...], fits: Callable[[Path], bool], what: str) -> Path:
    found = next((root / place for place in places if fits(root / place)), None)
    if found is None:
        raise VisualError(
            f"There are no {what} in {root}; looked in {', '.join(places)}. Put them in one of these folders, or name "
            "their own."
        )
    return found
