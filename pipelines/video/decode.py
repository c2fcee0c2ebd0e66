"""Frames of MP4, MKV and WebM files: exactly those asked for, or a ``VideoError``.

decord decodes the files that it is exact with, PyAV all others; ``probe`` decides, and the choice is logged.

Damage inside a file's pictures: where decoding stops, both raise. Where FFmpeg's decoders of H.264 and MPEG-4 patch a
frame and say so, PyAV raises and decord, which is not told, gives what was patched; ``verify`` finds that. What looks
like other pictures to a decoder, as much damage of VP8, VP9 and MJPEG does, nobody can find.

Legend of shapes: T frames asked for, N frames of the video, H and W pixels.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import av  # noqa: F401 (before decord, whose old codec libraries would otherwise be found in place of PyAV's)
import decord
import numpy as np

from pipelines.video.exact import ExactReader, VideoError, unusable
from pipelines.video.probe import MAX_DURATION_S, MAX_PIXELS, Scan, VideoInfo, probe, scan

__all__ = ["Video", "VideoError", "VideoInfo", "indices_every", "open_video", "probe", "uniform_indices", "verify"]

log = logging.getLogger(__name__)
decord.logging.set_level(decord.logging.QUIET)  # what matters is raised

_SAME_TIME_S = 1e-6


def open_video(
    path: str | Path,
    reader: Literal["auto", "decord", "pyav"] = "auto",
    max_pixels: int = MAX_PIXELS,
    max_duration_s: float = MAX_DURATION_S,
) -> Video:
    """Open a video, to be closed or used as a context manager.

    "auto" takes the reader that ``probe`` names, and PyAV, with a warning, where decord then fails. Raises
    ``VideoError`` for what ``probe`` refuses, for frames of more than ``max_pixels`` pixels, for a video of more than
    ``max_duration_s`` seconds, and for "decord" with a file that it is not known to be exact with.
    """
    if reader not in ("auto", "decord", "pyav"):
        raise ValueError(f"reader is {reader!r}; it must be auto, decord or pyav. Change the call.")
    known = scan(path, max_pixels, max_duration_s)
    info = known.info
    if reader == "decord" and info.reader != "decord":
        raise VideoError(f"{path} is not for decord: {info.reason}; auto and pyav are. Leave the reader on auto.")
    if reader == "pyav":
        info = replace(info, reader="pyav", reason="asked for")
    _say_once(logging.INFO, f"{path}: {info.reader} ({info.reason})")
    if known.missing_s > 1 + 0.1 * info.duration_s:
        _say_once(logging.WARNING, f"{path}: its frames end {known.missing_s:.1f} s before the time in its header")
    return Video(path, replace(known, info=info), may_change=reader == "auto")


def verify(path: str | Path) -> VideoInfo:
    """Decode all of a video with PyAV and return ``probe``'s facts; raises ``VideoError`` for damage that shows."""
    with open_video(path, "pyav") as video:
        for index in range(video.info.num_frames):
            video.frames([index])
    return probe(path)


class Video:
    """An open video of N frames; ``info`` tells its reader.

    It belongs to the process that opened it: it is not pickled, and opened after a fork, not before. Frames are
    upright; their pixels are those stored, even if meant to be shown wider than high.
    """

    def __init__(self, path: str | Path, known: Scan, may_change: bool) -> None:
        self.info, self._path, self._known, self._pid = known.info, path, known, os.getpid()
        self._may_change = may_change
        self._reader: _Decord | ExactReader | None = None
        if self.info.reader == "decord":
            try:
                self._reader = _Decord(path, self.info)
            except _DecordError as error:
                self._leave_decord(error)
        else:
            self._reader = self._exact()

    @property
    def num_decoded(self) -> int | None:
        """Number of frames decoded so far, also on the way to those asked for; None with decord, which is silent."""
        return getattr(self._reader, "num_decoded", None)

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Return uint8 RGB ``[T, H, W, 3]`` of the frames ``indices``, in any order, also repeated.

        Raises ``VideoError`` for an index that is not in [0, N) and for a frame that cannot be decoded.
        """
        if self._reader is None or self._pid != os.getpid():
            raise RuntimeError(f"{self._path} was closed, or opened by another process")
        wanted, places = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        if not len(wanted):
            return np.empty((0, self.info.height, self.info.width, 3), np.uint8)
        if wanted[0] < 0 or wanted[-1] >= self.info.num_frames:
            raise VideoError(
                f"frame {wanted[0] if wanted[0] < 0 else wanted[-1]} of {self._path} was asked for; there are frames "
                f"0 to {self.info.num_frames - 1}. Choose indices by info.num_frames."
            )
        try:
            images = self._reader.frames(wanted.tolist())
        except _DecordError as error:
            self._leave_decord(error)
            images = self._reader.frames(wanted.tolist())
        return images if np.array_equal(places, np.arange(len(images))) else images[places]

    def frames_at(self, seconds: Sequence[float]) -> np.ndarray:
        """Return uint8 RGB ``[T, H, W, 3]``: the frame shown at each time, the last one whose timestamp is not later.

        Times from [0, ``info.duration_s``); others are a ``VideoError``. A microsecond makes no difference.
        """
        for second in seconds:
            if not 0 <= second < self.info.duration_s:
                raise VideoError(
                    f"the frame at {second} s of {self._path} was asked for; times must be in "
                    f"[0, {self.info.duration_s:.6g}). Choose times by info.duration_s."
                )
        return self.frames(_shown_at(self.info, seconds))

    def close(self) -> None:
        """Free what the reader holds."""
        if isinstance(self._reader, ExactReader):
            self._reader.close()
        self._reader = None  # which frees decord's memory

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError("a Video stays in the process that opened it; pass the path and open it there")

    def _leave_decord(self, error: _DecordError) -> None:
        """Go on with PyAV, which may be exact where decord fails, or tells what is wrong."""
        reason = f"decord fails: {error}"
        if not self._may_change:
            raise unusable(self._path, reason) from error
        _say_once(logging.WARNING, f"{self._path}: pyav from now on ({reason})")
        self.info = replace(self.info, reader="pyav", reason=reason)
        self._reader = self._exact()

    def _exact(self) -> ExactReader:
        info = self.info
        return ExactReader(self._path, self._known.packets, self._known.orientation, info.height, info.width)


def uniform_indices(num_frames: int, num: int) -> list[int]:
    """Return the middles of ``num`` equal parts of the frames; of fewer frames than ``num``, each one, once."""
    if num_frames < 1 or num < 1:
        raise ValueError(f"{num} of {num_frames} frames were asked for; both must be 1 or more. Change the call.")
    if num >= num_frames:
        return list(range(num_frames))
    return [(2 * part + 1) * num_frames // (2 * num) for part in range(num)]


def indices_every(info: VideoInfo, seconds: float, limit: int | None = None) -> list[int]:
    """Return the frames shown at 0, ``seconds``, 2 ``seconds`` ... while the video lasts, at least one.

    A frame shown for longer than ``seconds`` comes more than once. Of more than ``limit`` frames, ``limit`` are kept,
    evenly spread.
    """
    if seconds <= 0 or (limit is not None and limit < 1):
        raise ValueError(f"a frame per {seconds} s, at most {limit}: both must be above 0. Change the call.")
    num = max(1, int(np.ceil((info.duration_s - _SAME_TIME_S) / seconds)))
    indices = _shown_at(info, np.arange(num) * seconds)
    return indices if limit is None else [indices[place] for place in uniform_indices(num, limit)]


def _shown_at(info: VideoInfo, seconds: Sequence[float] | np.ndarray) -> list[int]:
    times = np.asarray(seconds, dtype=np.float64) + _SAME_TIME_S
    return (np.searchsorted(info.timestamps, times, side="right") - 1).tolist()


@lru_cache(maxsize=65536)  # as many files as are remembered
def _say_once(level: int, message: str) -> None:
    log.log(level, message)


class _DecordError(Exception):
    """decord fails, or does not give what it must."""


class _Decord:
    def __init__(self, path: str | Path, info: VideoInfo) -> None:
        self._shape = (info.height, info.width, 3)
        with _noticing():
            # Without a tolerance decord repeats the frame before one that it fails to decode.
            self._reader = decord.VideoReader(f"file:{path}", num_threads=1, fault_tol=1e-9)
            times = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0]
        if len(times) != info.num_frames or not np.allclose(times - times[0], info.timestamps, rtol=1e-6, atol=1e-3):
            raise _DecordError(f"it finds {len(times)} frames at other times than those of {info.num_frames} packets")

    def frames(self, indices: list[int]) -> np.ndarray:
        with _noticing():
            images = self._reader.get_batch(indices).asnumpy()
        if images.shape != (len(indices), *self._shape):
            raise _DecordError(f"its frames have the shape {images.shape[1:]} instead of {self._shape}")
        return images


@contextlib.contextmanager
def _noticing() -> Iterator[None]:
    try:
        yield
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _DecordError(lines[0].rpartition(": ")[2]) from error  # without times and places in its own code
