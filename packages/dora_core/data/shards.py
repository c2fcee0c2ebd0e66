"""WebDataset shards with random access: tars of ``<key>.jpg`` and ``<key>.json``, found, read and written.

Contents are returned as bytes. Nothing is decoded or unpickled, and no URL or command is opened.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from webdataset import TarWriter

from dora_core.config import require
from dora_core.data.rows import DataError
from dora_core.data.shard_index import read_index, split_name
from dora_core.data.store import RowStore

MAX_OPEN_FILES = 64
"""Shards that a process keeps open at once."""


@dataclass(frozen=True)
class _Shard:
    path: Path
    name: str
    size: int
    mtime_ns: int


class ShardSet:
    """The samples of several shards, numbered through in the order of ``files`` and, inside a shard, of its members.

    Each tar is indexed once (see ``shard_index.read_index``); reading a member is then one ``pread``. The table is
    shared by forked workers and every process opens files for itself, so a set can be forked and pickled.

    Raises ``DataError``, which names the file, for a shard that is damaged, or was changed since the set was made.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        paths = [Path(os.path.abspath(file)) for file in files]
        if not paths or len(set(paths)) < len(paths):
            raise DataError(
                f"{len(paths)} shards were given, {len(paths) - len(set(paths))} of them a second time; a set has one "
                "or more, each once. Change the list of shards."
            )
        self._root = Path(os.path.commonpath([path.parent for path in paths]))
        self._shards: list[_Shard] = []
        self._samples = RowStore(self._indexed(paths))
        if not self._samples:
            raise DataError(
                f"{paths[0]} and {len(paths) - 1} other shards hold no sample; members must be named <key>.<suffix>. "
                "Give shards that do."
            )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._samples)

    def key(self, index: int) -> str:
        """Return ``<shard>/<key>``; the shard is its path below the folder that all shards have in common."""
        sample = self._samples[index]
        return f"{self._shards[sample['shard']].name}/{sample['key']}"

    def members(self, index: int) -> dict[str, int]:
        """Return the size in bytes of each member of a sample by suffix, which is in lower case, without a dot."""
        return {suffix: size for suffix, (_, size) in self._samples[index]["members"].items()}

    def read(self, index: int, suffix: str) -> bytes:
        """Return the content of a sample's member. Raises ``DataError`` if it has none of that suffix."""
        sample = self._samples[index]
        if suffix not in sample["members"]:
            raise DataError(
                f"{self.key(index)} has no member {suffix!r}; it has {', '.join(sample['members'])}. "
                "Add the member to the shard or leave out the sample."
            )
        return _read(self._shards[sample["shard"]], *sample["members"][suffix])

    @functools.cached_property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the shards' names and sizes and of the names, places and sizes of all members."""
        shards = [[shard.name, shard.size] for shard in self._shards]
        return hashlib.sha256(json.dumps([shards, self._samples.sha256]).encode()).hexdigest()

    def _indexed(self, paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
        for number, path in enumerate(paths):
            index = read_index(path)
            self._shards.append(_Shard(path, path.relative_to(self._root).as_posix(), index.size, index.mtime_ns))
            for key, members in index.samples.items():
                yield {"shard": number, "key": key, "members": members}


def shard_files(source: str | Path) -> list[Path]:
    """Return the shards that ``source`` names, sorted.

    ``source`` is a tar, a folder (all its ``*.tar``), a glob or a brace pattern like ``shard-{000000..000009}.tar``.
    Raises ``DataError`` if there are none, or for a brace pattern that names any shard which does not exist.
    """
    root = Path(source)
    if root.is_file():
        return [root]
    patterns = [os.path.join(glob.escape(str(source)), "*.tar")] if root.is_dir() else _expanded(str(source))
    found = {pattern: _matches(pattern) for pattern in patterns}
    missing = [pattern for pattern, files in found.items() if not files]
    if missing or not found:
        others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise _no_shards(source, f"nothing is at {', '.join(missing[:3])}{others}")
    return sorted({file for files in found.values() for file in files})


def write_shards(
    samples: Iterable[Mapping[str, Any]], folder: str | Path, pattern: str = "shard-%06d.tar", max_count: int = 10_000
) -> list[Path]:
    """Write samples as shards of at most ``max_count`` each and return the files.

    A sample has its key under ``__key__`` and the bytes of each member under its suffix. The same samples give the
    same bytes. A shard gets its name when it is complete; one of that name is replaced. Raises ``DataError`` for a
    sample that would not be read back as it is.
    """
    require(max_count > 0, "max_count", max_count, "1 or more")
    Path(folder).mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    remaining = iter(samples)
    for first in remaining:
        path = Path(folder) / (pattern % len(files))
        _write_shard(itertools.chain([first], itertools.islice(remaining, max_count - 1)), path)
        files.append(path)
    return files


def _expanded(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise _no_shards(pattern, str(error)) from None


def _matches(pattern: str) -> list[Path]:
    paths = map(Path, glob.glob(pattern, recursive=True) if glob.has_magic(pattern) else [pattern])
    return [path for path in paths if path.is_file()]


def _no_shards(source: str | Path, reason: str) -> DataError:
    return DataError(
        f"{source}: {reason}. Shards are given as a tar, a folder with *.tar, a glob, or a brace pattern such as "
        f"shard-{{000000..000009}}.tar, all of them files on this machine. Correct the path; relative ones start at "
        f"{Path.cwd()}."
    )


class _Descriptor:
    """A file descriptor that is closed with its last reference, so never under a thread that reads from it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)


@functools.lru_cache(maxsize=MAX_OPEN_FILES)
def _opened(shard: _Shard) -> _Descriptor:
    descriptor = _Descriptor(os.open(shard.path, os.O_RDONLY))
    status = os.fstat(descriptor.number)
    if (status.st_size, status.st_mtime_ns) != (shard.size, shard.mtime_ns):
        raise DataError(
            f"{shard.path} was changed while it is in use; a shard must stay as it is until the run ends. Start again."
        )
    return descriptor


def _read(shard: _Shard, offset: int, size: int) -> bytes:
    try:
        descriptor = _opened(shard)
        content = os.pread(descriptor.number, size, offset)
        while len(content) < size and (more := os.pread(descriptor.number, size - len(content), offset + len(content))):
            content += more
    except OSError as error:
        raise DataError(
            f"{shard.path} cannot be read ({error.strerror}); it must stay in place until the run ends. "
            "Restore the file and start again."
        ) from error
    if len(content) < size:
        raise DataError(
            f"{shard.path} ends at byte {offset + len(content):,}, inside a member; it must stay as it is until the "
            "run ends. Restore the file and start again."
        )
    return content


def _write_shard(samples: Iterable[Mapping[str, Any]], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    keys: set[str] = set()
    try:
        with temporary.open("wb") as file, TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer:
            for sample in samples:
                _check_sample(sample, keys)
                writer.write(dict(sample))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_sample(sample: Mapping[str, Any], keys: set[str]) -> None:
    key = sample.get("__key__")
    members = {suffix: content for suffix, content in sample.items() if suffix != "__key__"}
    if not members or not all(isinstance(content, bytes) for content in members.values()):
        types = {name: type(content).__name__ for name, content in members.items()}
        raise DataError(
            f"The sample {key!r} has the members {types}; it must have one or more, all bytes. Encode them."
        )
    wrong = [suffix for suffix in members if split_name(f"{key}.{suffix}") != (key, suffix)]
    if wrong or key in keys:
        raise DataError(
            f"The sample {key!r} with {', '.join(wrong) or 'this key'} would not be read back so; a key is a string "
            "without a dot in its last part, once per shard, and a suffix is in lower case. Rename it."
        )
    keys.add(key)
