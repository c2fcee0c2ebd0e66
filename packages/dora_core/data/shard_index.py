"""Where each member of a WebDataset shard lies: read from the tar's headers once, then from a file beside it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tarfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dora_core.data.rows import INDEX_SUFFIX, DataError

Span = tuple[int, int]
"""Offset and size in bytes of a member's content inside its shard."""

Samples = dict[str, dict[str, Span]]
"""Of each sample, by key and in the shard's order: the spans of its members by suffix."""

_FORMAT = 1
_BLOCK = 512
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class ShardIndex:
    """The member table of one shard and the state of the file that it holds for."""

    size: int
    mtime_ns: int
    samples: Samples


def read_index(path: Path) -> ShardIndex:
    """Return the index of a shard, from ``<shard>.index.json`` if that was made of the file as it is now.

    Otherwise the tar's headers are read and the index is written for the next time, if the folder allows it. Only
    regular files are members; links, folders and devices are not. Members of one key need not be neighbours.

    Raises ``DataError``, which names the file, for a tar that is missing, compressed, damaged, cut off or without an
    end-of-archive mark, for a sparse member and for two members of one name.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            samples = _stored_samples(path, status)
            if samples is None:
                samples = _walk(file, path, status.st_size)
                _store(path, status, samples)
    except OSError as error:
        raise _unusable(path, f"cannot be read ({error.strerror})") from error
    return ShardIndex(status.st_size, status.st_mtime_ns, samples)


def split_name(name: str) -> tuple[str, str] | None:
    """Return a member's key and its suffix in lower case, or None if WebDataset does not read such a member.

    The key is all up to the first dot of the base name: ``a.b/c.seg.PNG`` is ``seg.png`` of ``a.b/c``.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or _WEBDATASET_META.match(name):
        return None
    return folder + slash + stem, suffix.lower()


def _walk(file: BinaryIO, path: Path, size: int) -> Samples:
    samples: Samples = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # else it keeps every header
                _check(member, path, size)
                if member.isreg() and (name := split_name(member.name)):
                    _add(samples, *name, member, path)
            end = tar.offset
    except DataError:
        raise
    except Exception as error:  # for damaged headers tarfile raises anything from ReadError to RecursionError
        raise _unusable(path, f"not a readable tar ({type(error).__name__}: {error})") from error
    if os.pread(file.fileno(), _BLOCK, end) != bytes(_BLOCK):  # where it meets a bad header, tarfile just stops
        raise _unusable(path, f"neither a valid header nor the end-of-archive mark at byte {end:,}")
    return samples


def _check(member: tarfile.TarInfo, path: Path, size: int) -> None:
    if member.size < 0:  # followed further, it leads tarfile in circles
        raise _unusable(path, f"the member {member.name!r} has a negative size")
    if member.issparse():
        raise _unusable(path, f"the member {member.name!r} is sparse")
    if member.isreg() and member.offset_data + member.size > size:
        raise _unusable(path, f"cut off within the member {member.name!r}")


def _add(samples: Samples, key: str, suffix: str, member: tarfile.TarInfo, path: Path) -> None:
    members = samples.setdefault(key, {})
    if suffix in members:
        raise _unusable(path, f"two members are named {member.name!r} (the case of the suffix does not count)")
    members[suffix] = (member.offset_data, member.size)


def _unusable(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path}: {reason}. A shard is an uncompressed, complete tar of regular files, each name once. Write or "
        "download the file again, or leave it out."
    )


def _cache_path(path: Path) -> Path:
    return path.with_name(path.name + INDEX_SUFFIX)


def _stored_samples(path: Path, status: os.stat_result) -> Samples | None:
    """Return what an earlier process found in the same file; None if there is nothing or it cannot be trusted."""
    try:
        stored = json.loads(_cache_path(path).read_bytes())
        state = (stored["format"], stored["size"], stored["mtime_ns"])
        if state != (_FORMAT, status.st_size, status.st_mtime_ns):
            return None
        return {
            key: {suffix: _span(span, status.st_size) for suffix, span in members.items()}
            for key, members in stored["samples"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _span(value: list[int], shard_size: int) -> Span:
    offset, size = value
    if type(offset) is not int or type(size) is not int or not 0 <= offset <= offset + size <= shard_size:
        raise ValueError(f"{value} is no span of a file of {shard_size} bytes")
    return offset, size


def _store(path: Path, status: os.stat_result, samples: Samples) -> None:
    cache = _cache_path(path)
    temporary = cache.with_name(f".{cache.name}.{uuid.uuid4().hex}")
    state = {"format": _FORMAT, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    with contextlib.suppress(OSError):  # a folder that cannot be written to only costs the time to index again
        try:
            temporary.write_text(json.dumps({**state, "samples": samples}), encoding="utf-8")
            os.replace(temporary, cache)
        finally:
            temporary.unlink(missing_ok=True)
