"""Frames of a video by their exact times of presentation, with PyAV: right for every codec and container.

To seek by time alone is not: a container may land on a later key frame, or on a frame that is none, and a decoder that
starts there gives other frames under the right times, or none.

Legend of shapes: P packets in the order they are decoded, N frames in the order they are shown, K key packets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av import Packet, VideoFrame
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

# The list of formats also keeps a playlist that is named like a video from opening other files.
_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm", "protocol_whitelist": "file"}
_NEAR = 8  # frames, decoded about as fast as a key frame is sought


class VideoError(ValueError):
    """A video cannot be used; the message gives its name and the reason."""


def unusable(path: str | Path, reason: str) -> VideoError:
    """Return the error of a file that is not what a video must be."""
    return VideoError(
        f"{path}: {reason}. A video is a complete MP4, MKV or WebM file whose frames have times. "
        "Replace the file, write it anew with ffmpeg, or remove its row."
    )


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn errors of FFmpeg into ``VideoError``."""
    try:
        yield
    except av.error.FFmpegError as error:
        raise unusable(path, f"it cannot be read ({error.strerror})") from error


def open_container(path: str | Path) -> tuple[InputContainer, VideoStream]:
    """Open a file and find its video stream, to be decoded on one thread; the caller closes the container."""
    if not Path(path).is_file():
        raise unusable(path, "there is no such file")
    with reading(path):
        # "file:" because a name may look like an address; metadata may be in any encoding and is not needed.
        container = av.open(f"file:{path}", options=_OPTIONS, metadata_errors="ignore")
        stream = container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic or stream.codec_context is None:
            container.close()
            raise unusable(path, "it has no video that can be decoded")
        stream.thread_count = 1
        return container, stream


@dataclass(frozen=True)
class Orientation:
    """What makes a stored frame upright: first exchange rows and columns, then mirror left-right and top-bottom."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @property
    def rotation(self) -> int:
        """Degrees clockwise; a mirrored frame is mirrored left-right after that."""
        return 90 + 180 * self.flip_y if self.transpose else 180 * self.flip_y

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return a view of ``[H, W, 3]``."""
        image = image.swapaxes(0, 1) if self.transpose else image
        return image[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


@dataclass(frozen=True, eq=False)
class Packets:
    """Where frames are: ``pts`` and ``dts`` ``[P]`` in ticks, ``keys`` ``[K]`` places of key packets, ``frames``
    ``[N]`` places of the frames' packets, ``starts`` ``[N]`` which of the keys to decode each frame from.
    """

    pts: np.ndarray
    dts: np.ndarray
    keys: np.ndarray
    frames: np.ndarray
    starts: np.ndarray


class ExactReader:
    """Decodes from a key packet on; ``num_decoded`` counts all frames decoded so far. The caller closes it.

    ``height`` and ``width`` are of the upright frame; frames stored in another size are scaled to it.
    """

    def __init__(self, path: str | Path, packets: Packets, orientation: Orientation, height: int, width: int) -> None:
        self.num_decoded = 0
        self._path, self._packets, self._orientation = path, packets, orientation
        self._height, self._width = height, width
        self._times, self._key_times = packets.pts[packets.frames], packets.pts[packets.keys]
        self._by_time = np.argsort(packets.pts, kind="stable")
        self._scaler = VideoReformatter()
        self._container, self._stream = open_container(path)
        self._decoded: Iterator[VideoFrame] = iter(())
        self._key = 0  # decoding started from this of the keys
        self._key_seen = False  # whether its frame came and is a key frame, as the container says
        self._damaged = False  # whether frames may refer to a damaged one
        self._last: int | None = None  # time of the frame decoded last, None before decoding started

    def frames(self, indices: list[int]) -> np.ndarray:
        """Return uint8 RGB ``[T, H, W, 3]`` of increasing ``indices``; a damaged frame is a ``VideoError``."""
        size = (self._height, self._width) if self._orientation.transpose else (self._width, self._height)
        images = np.empty((len(indices), self._height, self._width, 3), np.uint8)
        with reading(self._path):
            for image, index in zip(images, indices, strict=True):
                picture = self._scaler.reformat(self._frame(index), *size, format="rgb24", threads=1)
                image[:] = self._orientation.apply(picture.to_ndarray())
        return images

    def close(self) -> None:
        """Free the decoder and the file."""
        self._decoded = iter(())  # a generator that holds this reader, which would wait for the garbage collector
        self._container.close()

    def _frame(self, index: int) -> VideoFrame:
        time, start = int(self._times[index]), int(self._packets.starts[index])
        frame = self._decode_until(time) if self._is_near(time, start) else None
        step = 1
        while frame is None and start >= 0:  # from the key packet, then from earlier ones, at last from the first
            self._start_from(start)
            frame = self._decode_until(time)
            start, step = -1 if start == 0 else max(0, start - step), 2 * step
        if frame is None:
            raise self._damage(time)
        return frame

    def _is_near(self, time: int, start: int) -> bool:
        if self._last is None or time <= self._last:
            return False
        num_between = np.searchsorted(self._times, self._key_times[start]) - np.searchsorted(self._times, self._last)
        return num_between <= _NEAR

    def _start_from(self, key: int) -> None:
        """Seek so that the key packet, or one before it, is read next; open the file anew if there is no other way."""
        place = int(self._packets.keys[key])
        self._key, self._key_seen, self._damaged, self._last = key, False, False, None
        for ticks in (self._packets.pts[place], self._packets.dts[place]):  # containers differ in which they index
            with contextlib.suppress(av.error.FFmpegError):
                self._container.seek(int(ticks), stream=self._stream)
                packets = self._container.demux(self._stream)
                first = next(packets)
                if self._place(first) <= place:
                    self._decoded = self._decode(chain([first], packets), place)
                    return
        self.close()
        self._container, self._stream = open_container(self._path)
        self._decoded = self._decode(self._container.demux(self._stream), place)

    def _decode(self, packets: Iterator[Packet], place: int) -> Iterator[VideoFrame]:
        """Decode what comes from the packet at ``place`` on."""
        skipping = True
        for packet in packets:
            skipping = skipping and packet.pts != self._packets.pts[place] and self._place(packet) < place
            if not skipping and (packet.size or packet.pts is None):  # an empty one in the middle would end decoding
                yield from packet.decode()

    def _place(self, packet: Packet) -> int:
        """Return a packet's place in decoding order; that of the end is after all others."""
        pts = self._packets.pts
        if packet.pts is None:
            return len(pts)
        return int(self._by_time[min(np.searchsorted(pts, packet.pts, sorter=self._by_time), len(pts) - 1)])

    def _decode_until(self, time: int) -> VideoFrame | None:
        """Return the frame of that time, None if it does not come; raises ``VideoError`` if it is surely damaged."""
        try:
            for frame in self._decoded:
                self.num_decoded += 1
                self._last = frame.pts
                self._key_seen |= frame.key_frame and frame.pts == self._key_times[self._key]
                if frame.is_corrupt or frame.key_frame:
                    self._damaged = frame.is_corrupt
                if frame.pts == time and not self._damaged and (self._key_seen or self._key == 0):
                    return frame
                if frame.pts is not None and frame.pts >= time:
                    break
        except av.error.FFmpegError:
            self._damaged = True
        self._last = None
        if self._key_seen and self._damaged:
            raise self._damage(time)
        return None

    def _damage(self, time: int) -> VideoError:
        return unusable(
            self._path, f"frame {np.searchsorted(self._times, time)} cannot be decoded, the file is damaged"
        )
