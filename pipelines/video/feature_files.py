"""The three forms of stored features, read: shards of ``extract.py``, VALUE's .npz and VL-Adapter's .h5 files.

Importing this module must stay cheap (no torch).
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from dora_core.data.shards import ShardSet

FORMAT = 1
"""Of manifest and plan."""
MANIFEST = "manifest.json"
"""What a folder of shards holds; there once all of them are."""
PLAN = "plan.json"
"""What the shards of a folder are made of; there from the start."""
MEMBER = "npy"
"""Suffix of a sample's only member: float16 ``[L, dim]`` as ``np.save`` writes it."""
GRID = 6
"""A picture's feature map is pooled to 6 x 6 vectors, as VL-Adapter does."""
_STORED_GRID = 7


class VisualError(ValueError):
    """Features or media are not there or cannot be used; the message says which and why."""


class NameTable:
    """Names in arrays, which forked workers share: each look at a string would copy the memory that it is in."""

    def __init__(self, names: list[str]) -> None:
        encoded = np.array([_bytes(name) for name in names])
        self._places = np.argsort(encoded)
        self._sorted = encoded[self._places]

    def __len__(self) -> int:
        return len(self._sorted)

    def find(self, name: str) -> int | None:
        """Return the place that a name had among those given, or None."""
        word = _bytes(name)
        at = self._near(word)
        return int(self._places[at]) if at < len(self) and self._sorted[at] == word else None

    def close_to(self, name: str) -> list[str]:
        """Return up to three similar names, of those that begin alike."""
        at = self._near(_bytes(name))
        near = self._sorted[max(at - 16, 0) : at + 16].tolist()
        return difflib.get_close_matches(name, [word.decode("utf-8", "surrogatepass") for word in near])

    def _near(self, word: bytes) -> int:
        # cut to the array's width: for a wider word numpy would convert the whole array
        return int(np.searchsorted(self._sorted, np.array(word[: self._sorted.itemsize], self._sorted.dtype)))


def unusable(what: object, reason: str) -> VisualError:
    """Return the error for features that are there and cannot be used."""
    return VisualError(
        f"{what} cannot be used: {reason}. Features are floating-point numbers, a row per vector, in a whole file. "
        "Extract or download them again, or remove the rows that need them."
    )


def read_npz(folder: Path, name: str, place: int) -> np.ndarray:
    """Return the array ``features`` of ``<name>.npz``."""
    path = folder / f"{name}.npz"

    def read() -> np.ndarray:
        with np.load(path, allow_pickle=False) as arrays:
            if "features" not in arrays:
                raise unusable(path, f"it has the arrays {', '.join(arrays) or 'none'} and not 'features'")
            return arrays["features"]

    return _undamaged(path, read)


def read_h5(folder: Path, name: str, place: int) -> np.ndarray:
    """Return ``<name>/features`` of ``<name>.h5``; 49 vectors of a 7 x 7 grid become 36."""
    import h5py

    path = folder / f"{name}.h5"

    def read() -> np.ndarray:
        with h5py.File(path, "r", locking=False) as file:  # many network file systems have no locks
            if f"{name}/features" not in file:
                raise unusable(path, f"it has {', '.join(file) or 'nothing'} and not '{name}/features'")
            return file[f"{name}/features"][...]

    values = _undamaged(path, read)
    if values.ndim != 2 or len(values) not in (GRID**2, _STORED_GRID**2) or values.dtype.kind != "f":
        form = f"{values.dtype} of the shape {list(values.shape)}"
        raise unusable(path, f"its features are {form} and not floating-point [49, dim] or [36, dim]")
    return values if len(values) == GRID**2 else pool_grid(values)


def read_sample(shards: ShardSet, name: str, place: int) -> np.ndarray:
    """Return the array of a sample, given by its number in the shards."""
    return _undamaged(
        f"the sample {name!r}", lambda: np.load(io.BytesIO(shards.read(place, MEMBER)), allow_pickle=False)
    )


def open_shards(folder: Path) -> tuple[ShardSet, dict[str, Any]]:
    """Return the shards that a manifest lists, and the manifest."""
    from dora_core.data.shards import ShardSet

    path = folder / MANIFEST
    if not path.is_file():
        raise VisualError(
            f"{folder} has no {MANIFEST}: its shards are not complete. Features are read once all are there. Let "
            "pipelines.video.extract run to its end, with the same settings; what is done is kept."
        )
    try:
        manifest = json.loads(path.read_bytes())
        form, listed, num_samples = manifest["format"], manifest["shards"], manifest["num_samples"]
        names, _ = [shard["name"] for shard in listed], manifest["dim"]
    except (ValueError, KeyError, TypeError) as error:
        raise unusable(path, f"it is no manifest of extracted features ({type(error).__name__}: {error})") from None
    if form != FORMAT:
        raise unusable(path, f"it has the format {form}, and this version reads {FORMAT}")
    if not names:
        raise unusable(folder, "its manifest lists no shard")
    try:
        shards = ShardSet([folder / name for name in names])
    except ValueError as error:
        raise VisualError(str(error)) from None
    if len(shards) != num_samples:
        raise unusable(folder, f"its shards hold {len(shards):,} samples and its manifest says {num_samples:,}")
    return shards, manifest


def names_in(shards: ShardSet) -> list[str]:
    """Return the names of all samples, by number."""
    return [name_of(shards.key(place).split("/", 1)[1]) for place in range(len(shards))]


def sha256_of_shards(folder: Path, shards: ShardSet) -> str:
    """Return what identifies shards: a hash of the manifest, which has that of each shard, and of where samples lie."""
    return hashlib.sha256((folder / MANIFEST).read_bytes() + shards.sha256.encode()).hexdigest()


def sha256_of_files(folder: Path, names: list[str], suffix: str) -> str:
    """Return a hash of the names and sizes of files, which costs no reading."""
    digest = hashlib.sha256()
    for name in names:
        size = (folder / f"{name}{suffix}").stat().st_size
        digest.update(json.dumps([name, size]).encode())
    return digest.hexdigest()


def key_of(name: str) -> str:
    """Return the key of a name in shards, which is the name itself where WebDataset allows it.

    In its keys a dot ends the name, and what begins with two underscores may be no sample. Dots and percent signs are
    therefore written as in URLs, and so is the first of two underscores at the beginning.
    """
    key = name.replace("%", "%25").replace(".", "%2E")
    return "%5F" + key[1:] if key.startswith("__") else key


def name_of(key: str) -> str:
    """Return the name that ``key_of`` made a key of."""
    return urllib.parse.unquote(key, errors="strict")


def pool_grid(values: np.ndarray) -> np.ndarray:
    """Return ``[36, dim]`` of a 7 x 7 grid ``[49, dim]``: the maxima over torch's ``AdaptiveMaxPool2d`` windows."""
    grid = values.astype(np.float32).reshape(_STORED_GRID, _STORED_GRID, -1).swapaxes(0, 1)
    columns = adaptive_max(grid, GRID).swapaxes(0, 1)  # rows last: of 0 and -0, torch keeps what comes first in a row
    return adaptive_max(columns, GRID).reshape(GRID * GRID, -1).astype(values.dtype)


def adaptive_max(values: np.ndarray, num: int) -> np.ndarray:
    """Return ``[num, ...]`` maxima over the windows into which torch's ``AdaptiveMaxPool1d`` cuts the first axis."""
    places = np.arange(num)
    starts, last = places * len(values) // num, ((places + 1) * len(values) - 1) // num
    wide = values.astype(np.float32) if values.dtype == np.float16 else values  # comparing halves takes far longer
    best = wide[starts]
    for step in range(1, int((last - starts).max()) + 1):
        more = wide[np.minimum(starts + step, last)]
        best = np.where((more > best) | np.isnan(more), more, best)
    return best.astype(values.dtype)


def _undamaged(what: object, read: Callable[[], np.ndarray]) -> np.ndarray:
    try:
        return read()
    except VisualError:
        raise
    except Exception as error:  # for damaged files zipfile, numpy and HDF5 raise a dozen unrelated types
        raise unusable(what, f"it cannot be read ({type(error).__name__}: {error})") from error


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")
