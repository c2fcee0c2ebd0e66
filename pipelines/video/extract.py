"""Cache features as shards: ``python -m pipelines.video.extract --media FOLDER --output FOLDER --encoder NAME``.

The names are cut into fixed lists, and each list becomes a shard that is there whole or not at all: a run that was
killed goes on where it was, with any number of ranks. Ranks, under torchrun or as jobs of their own with ``--rank`` and
``--world-size``, need not run at one time; the one that finds all shards done writes ``manifest.json``.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: import from this checkout, never from this file's own folder
    _root = Path(__file__).resolve().parents[2]
    _own = Path(__file__).parent
    sys.path[:] = [str(_root / "packages"), str(_root), *(p for p in sys.path if Path(p or ".").resolve() != _own)]

import numpy as np
import torch
from torch import Tensor

from dora_core.config import require
from dora_core.data.loader import batch_loader
from dora_core.data.shards import write_shards
from dora_core.media.images import ImageError
from dora_core.training.script import run_script
from pipelines.video.decode import VideoError
from pipelines.video.feature_files import MANIFEST, MEMBER, VisualError, key_of
from pipelines.video.feature_folder import Bad, FeatureFolder, Record
from pipelines.video.features import load_encoder
from pipelines.video.frames import frames_of, is_video
from pipelines.video.frozen import DTYPES, FrozenEncoder
from pipelines.video.visual import media_file, media_names


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and extract this rank's share."""
    parser = argparse.ArgumentParser(prog="pipelines.video.extract", description=__doc__, allow_abbrev=False)
    parser.add_argument("--media", type=Path, required=True, help="folder of pictures or videos")
    parser.add_argument("--output", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--encoder", required=True, help="open_clip:<model>[:<tag or weights file>] or pixels:<side>")
    parser.add_argument("--kind", choices=("frame", "grid"), help="a ResNet's grid and else a frame, if not given")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--seconds", type=float, default=1.5, help="of video, for each of which one frame is taken")
    parser.add_argument("--names", type=Path, help="file with a name per line; all in the folder, if not given")
    parser.add_argument("--shard-size", type=int, default=1000, help="names per shard")
    parser.add_argument("--max-bad-fraction", type=float, default=0.01, help="share of media that may be unreadable")
    parser.add_argument("--num-workers", type=int, default=0, help="processes per rank that decode ahead")
    parser.add_argument("--rank", type=int, default=int(os.environ.get("RANK", "0")))
    parser.add_argument("--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", "1")))
    own = parser.parse_args(arguments)
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    extract(
        own.media,
        own.output,
        load_encoder(own.encoder, own.kind, own.precision, device),
        names=own.names.read_text(encoding="utf-8").split("\n") if own.names else None,
        seconds=own.seconds,
        shard_size=own.shard_size,
        max_bad_fraction=own.max_bad_fraction,
        num_workers=own.num_workers,
        rank=own.rank,
        world_size=own.world_size,
    )


def extract(
    media: str | Path,
    output: str | Path,
    encoder: FrozenEncoder,
    *,
    names: Sequence[str] | None = None,
    seconds: float = 1.5,
    shard_size: int = 1000,
    max_bad_fraction: float = 0.01,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    say: Callable[[str], None] = print,
) -> Record | None:
    """Write the shards of this rank that are not there; return the manifest, or None while shards of others are not.

    A sample is named as its file, and its member ``npy`` is float16 ``[L, dim]``: a vector per frame, or 36. Shard i
    has ``names[i * shard_size : (i + 1) * shard_size]`` and is rank ``i % world_size``'s. A file that cannot be read is
    left out and listed in the manifest.

    Raises ``VisualError`` if ``output`` was begun with other settings or names; and, once all shards and the manifest
    are there, if more than ``max_bad_fraction`` of the files could not be read.
    """
    require(Path(media).is_dir(), "media", str(media), "a folder of pictures or videos")
    require(seconds > 0, "seconds", seconds, "positive")
    require(shard_size > 0, "shard_size", shard_size, "1 or more")
    require(0 <= rank < world_size, "rank", rank, f"in [0, world_size) with world_size {world_size}")
    require(0 <= max_bad_fraction <= 1, "max_bad_fraction", max_bad_fraction, "in [0, 1]")
    given = media_names(media) if names is None else [name for name in names if name.strip()]
    settings = {"encoder": encoder.identity, "preprocessing_sha256": encoder.preprocessing_hash, "seconds": seconds}
    folder = FeatureFolder(Path(output), settings, _checked(given, media), shard_size)
    folder.begin()
    for number in range(rank, folder.num_shards, world_size):
        own = _Media(Path(media), folder.names_of(number), encoder, seconds)
        started = time.monotonic()
        report = folder.make(number, partial(_write, own, encoder, num_workers))
        if report is not None:
            say(_line(number, folder.num_shards, report, time.monotonic() - started))
    manifest = folder.finish(max_bad_fraction, kind=encoder.kind, dim=encoder.dim)
    if manifest is None:
        say(f"The shards of this rank are done; {MANIFEST} is written by the rank that finds all done.")
    return manifest


class _Media:
    """Files as ``(name, uint8 [T, 3, size, size] or why it cannot be read)``, for processes that decode ahead."""

    def __init__(self, folder: Path, names: list[str], encoder: FrozenEncoder, seconds: float) -> None:
        self.names = names
        self._folder = folder
        self._preprocessing = encoder.preprocessing
        self._is_grid = encoder.kind == "grid"
        self._seconds = seconds

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> tuple[str, Tensor | str]:
        name = self.names[place]
        try:
            path = media_file(self._folder, name)
            if self._is_grid and is_video(path):
                raise VisualError(f"{path} is a video, and grids are of pictures. Extract with --kind frame.")
            return name, frames_of(path, self._preprocessing, self._seconds)
        except (VisualError, VideoError, ImageError) as error:
            return name, str(error)


def _write(media: _Media, encoder: FrozenEncoder, num_workers: int, folder: Path, bad: Bad) -> list[Path]:
    return write_shards(_samples(media, encoder, num_workers, bad), folder, max_count=len(media))


def _samples(media: _Media, encoder: FrozenEncoder, num_workers: int, bad: Bad) -> Iterator[dict[str, Any]]:
    waiting: list[tuple[str, Tensor]] = []
    for name, pixels in batch_loader(media, [[place] for place in range(len(media))], _only, num_workers):
        if isinstance(pixels, str):
            bad.append((name, pixels))
            continue
        waiting.append((name, pixels))
        if sum(len(each) for _, each in waiting) >= encoder.batch:
            yield from _encoded(waiting, encoder)
            waiting = []
    if waiting:
        yield from _encoded(waiting, encoder)


def _encoded(waiting: list[tuple[str, Tensor]], encoder: FrozenEncoder) -> Iterator[dict[str, Any]]:
    features = encoder(torch.cat([pixels for _, pixels in waiting])).cpu()
    for (name, _), own in zip(waiting, features.split([len(pixels) for _, pixels in waiting]), strict=True):
        if not own.isfinite().all():
            raise VisualError(
                f"The features of {name!r} hold NaN, infinity or numbers too large for float16. Features must be "
                "finite. Check the weights, and extract with --precision fp32."
            )
        content = io.BytesIO()
        np.save(content, own.flatten(0, 1).numpy())
        yield {"__key__": key_of(name), MEMBER: content.getvalue()}


def _only(rows: list[Any]) -> Any:
    return rows[0]


def _line(number: int, num_shards: int, report: Record, seconds: float) -> str:
    bad = report["bad"]
    unreadable = f"; {len(bad)} files cannot be read, such as {bad[0][0]}: {bad[0][1]}" if bad else ""
    return f"shard {number + 1} of {num_shards}: {report['num_samples']} samples in {seconds:.1f} s{unreadable}"


def _checked(names: Sequence[str], media: str | Path) -> list[str]:
    """Return the names; none at all, a name twice, and one that is no place below the folder are errors."""
    names = [name.removesuffix("\r") for name in names]
    twice = [name for name, count in Counter(names).items() if count > 1]
    wrong = [name for name in names if {"", ".", ".."} & set(name.split("/")) or not _is_text(name)]
    if not names or twice or wrong:
        what = f"{wrong[0]!r} is no name" if wrong else f"{twice[0]!r} is in it twice" if twice else "it is empty"
        raise VisualError(
            f"The list of pictures and videos below {media} cannot be used: {what}. It has each file once, by its path "
            "in that folder without suffix, in Unicode. Correct the list, rename the file or name another folder."
        )
    return names


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)  # where a file's name was not UTF-8


if __name__ == "__main__":
    run_script(main)
