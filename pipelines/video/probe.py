"""What the packets of a video file say: when each frame is shown, where decoding may start, which library is exact.

Legend of shapes: P packets in the order they are decoded, N frames in the order they are shown, K key packets.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av import Packet, VideoFrame
from av.container import InputContainer
from av.video.stream import VideoStream

from pipelines.video.exact import Orientation, Packets, VideoError, open_container, reading, unusable

MAX_PIXELS = 7680 * 4320
"""Largest frame by default."""
MAX_DURATION_S = 4 * 3600.0
"""Longest video by default."""

_CODECS = {"libdav1d": "av1"}  # decoders that are not named like their codec
_DECORD_CODECS = ("h264", "vp8", "vp9", "mpeg4", "mjpeg")
_DECORD_WIDTH = 80  # of widths below, decord 0.6 cannot hand over 16, 24, 48 and 72
_DECORD_FORMATS = ("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p", "gbrp")


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """Facts about a video; ``width`` and ``height`` are those of the frames that are returned, upright.

    ``timestamps`` are float64 ``[N]``: seconds since the first frame is shown, strictly increasing. ``rotation`` is by
    how many degrees clockwise stored frames are turned to be upright. ``duration_s`` includes the time that the last
    frame is shown. ``reason`` says why ``reader`` decodes this file.
    """

    codec: str
    width: int
    height: int
    timestamps: np.ndarray
    rotation: int
    duration_s: float
    reader: Literal["decord", "pyav"]
    reason: str

    @property
    def num_frames(self) -> int:
        """Frames that can be asked for."""
        return len(self.timestamps)


@dataclass(frozen=True, eq=False)
class Scan:
    """All that is found before decoding; the frames end ``missing_s`` before the time that the file's header says."""

    info: VideoInfo
    packets: Packets
    orientation: Orientation
    missing_s: float


def probe(path: str | Path) -> VideoInfo:
    """Return what a file's packets say, and the one frame that is decoded, for only that knows how it is turned.

    Packets that are never shown are no frames: hidden by an edit list or by VP8, cut off at the file's end, referring
    to what was before the first key frame, or at the same time as the packet before.
    Raises ``VideoError`` for a file that is missing, empty, damaged, without video, or not MP4, MKV or WebM.
    """
    return scan(path).info


def scan(path: str | Path, max_pixels: int = MAX_PIXELS, max_duration_s: float = MAX_DURATION_S) -> Scan:
    """Read all packets and decode one frame, after the size and duration in the header were found within limits."""
    container, stream = open_container(path)
    with container, reading(path):
        promised_s = (container.duration or 0) / av.time_base
        _check_limits(path, stream.width, stream.height, promised_s, max_pixels, max_duration_s)
        first, rows, all_idr = _read(container, stream)
        if not rows or any(pts is None for pts, *_ in rows):
            raise unusable(path, "it has no packets, or some without the time at which they are shown")
        packets, durations, num_leading = _places(rows)
        if not len(packets.frames):
            raise unusable(path, "it has no frames that can be decoded")
        ticks_per_s = float(1 / stream.time_base)
        timestamps, duration_s = _timeline(packets, durations, ticks_per_s)
        orientation = _orientation(path, first)
        width, height = (first.width, first.height) if first else (stream.width, stream.height)
        if orientation.transpose:
            width, height = height, width
        _check_limits(path, width, height, duration_s, max_pixels, max_duration_s)
        codec = _CODECS.get(stream.codec_context.name, stream.codec_context.name)
        checks = (
            (codec not in _DECORD_CODECS, f"decord is not exact with {codec}"),
            (first is None or first.format.name not in _DECORD_FORMATS, "its pixels are of an unusual format"),
            (first is not None and first.interlaced_frame, "it is interlaced"),
            (orientation != Orientation(), "it is stored turned or mirrored"),
            (stream.width < _DECORD_WIDTH, "decord fails at some widths as small as its own"),
            (len(container.streams.video) > 1, "it has several streams of pictures"),
            (num_leading > 0, "it has frames that refer to the group before theirs (open groups)"),
            (len(packets.frames) < len(rows), "some of its packets are not shown"),
            (not all_idr, "decoding cannot start at each of its key frames"),
            (not _index_is_true(container, stream, packets), "its index names frames that are no key frames"),
        )
    reason = next((reason for wrong, reason in checks if wrong), None)
    choice = ("pyav", reason) if reason else ("decord", f"{codec} in closed groups")
    info = VideoInfo(codec, width, height, timestamps, orientation.rotation, duration_s, *choice)
    start_s = max(0.0, packets.pts[packets.frames[0]] / ticks_per_s)  # MKV's duration is from 0, MP4's from the start
    return Scan(info, packets, orientation, promised_s - duration_s - start_s)


def _check_limits(
    path: str | Path, width: int, height: int, duration_s: float, max_pixels: int, max_duration_s: float
) -> None:
    if width * height > max_pixels or duration_s > max_duration_s:
        raise VideoError(
            f"{path} has {width} x {height} pixels and lasts {duration_s:,.0f} s; at most {max_pixels:,} pixels and "
            f"{max_duration_s:,.0f} s are allowed. Scale it down, cut it, or remove its row."
        )


def _read(container: InputContainer, stream: VideoStream) -> tuple[VideoFrame | None, list[tuple], bool]:
    """Return a first frame, a row per packet (pts, dts, key, frame, duration) and whether H.264's keys are all IDR."""
    first, rows, all_idr = None, [], True
    codec, extradata = stream.codec_context.name, stream.codec_context.extradata
    for packet in container.demux(stream):
        if first is None and (len(rows) < 64 or packet.pts is None):
            with contextlib.suppress(av.error.FFmpegError):  # a damaged start leaves the rest to be read
                first = next(iter(packet.decode()), None)
        if not packet.size:  # the end, or nothing
            continue
        invisible = codec == "vp8" and not memoryview(packet)[0] & 0x10
        is_frame = not (packet.is_discard or packet.is_corrupt or invisible)
        rows.append((packet.pts, packet.dts, packet.is_keyframe, is_frame, packet.duration or 0))
        if codec == "h264" and packet.is_keyframe and all_idr:
            all_idr = _is_idr(packet, extradata)
    return first, rows, all_idr


def _is_idr(packet: Packet, extradata: bytes | None) -> bool:
    """Return whether nothing after an H.264 packet refers back: whether its first slice is of NAL type 5."""
    if not extradata or extradata[0] != 1:  # not stored with lengths, as MP4 and MKV do
        return False
    data, place, size = memoryview(packet), 0, (extradata[4] & 3) + 1
    while place + size < len(data):
        kind = data[place + size] & 31
        if kind in (1, 5):
            return kind == 5
        place += size + int.from_bytes(data[place : place + size], "big")
    return False


def _places(rows: list[tuple]) -> tuple[Packets, np.ndarray, int]:
    """Return where frames are, durations ``[P]`` in ticks, and the number of leading packets: decoded after a key
    packet but shown before it, so that they need the key packet before that one.
    """
    table = [(pts, pts if dts is None else dts, *rest) for pts, dts, *rest in rows]
    pts, dts, is_key, is_frame, durations = np.array(table, np.int64).T
    keys = np.flatnonzero(is_key) if is_key.any() else np.array([0])
    starts = np.searchsorted(keys, np.arange(len(pts)), side="right") - 1
    leading = (starts >= 0) & (pts < pts[keys[starts]])
    starts = starts - leading
    usable = np.flatnonzero((is_frame != 0) & (starts >= 0))
    frames = usable[np.unique(pts[usable], return_index=True)[1]]
    return Packets(pts, dts, keys, frames, starts[frames]), durations, int(leading.sum())


def _timeline(packets: Packets, durations: np.ndarray, ticks_per_s: float) -> tuple[np.ndarray, float]:
    """Return timestamps ``[N]`` and the duration, in seconds."""
    times, last = packets.pts[packets.frames], packets.frames[-1]
    timestamps = (times - times[0]) / ticks_per_s
    timestamps.flags.writeable = False
    # A packet's duration may be the time to the packet that is decoded next, not to the frame that is shown next.
    last_s = durations[last] / ticks_per_s if last + 1 == len(durations) else 0
    if last_s <= 0 and len(timestamps) > 1:
        last_s = np.median(np.diff(timestamps))
    return timestamps, float(timestamps[-1] + max(0, last_s))


def _index_is_true(container: InputContainer, stream: VideoStream, packets: Packets) -> bool:
    """Return whether the file's index, by which decord seeks, leads to a key frame.

    In an MP4 without a table of key frames each is one; FFmpeg sees better, for some codecs, when it reads the packet.
    """
    pts, keys = packets.pts, packets.keys
    if stream.codec_context.name == "mjpeg" or len(pts) == 1:
        return True
    if len(keys) == len(pts):
        return False
    lengths = np.diff(np.append(keys, len(pts)))
    longest = lengths.argmax()
    try:
        container.seek(int(pts[keys[longest] + lengths[longest] - 1]), stream=stream)
        return next(container.demux(stream)).is_keyframe
    except av.error.FFmpegError:
        return False


def _orientation(path: str | Path, frame: VideoFrame | None) -> Orientation:
    # Asked for its side data a frame refers to itself, so a small one must do: it waits for the garbage collector.
    side_data = frame.reformat(16, 16, threads=1).side_data if frame else ()
    for place in range(len(side_data)):
        if side_data[place].type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(side_data[place], np.int32)[:5].astype(float)
            if max(abs(b), abs(c)) < 0.01 * min(abs(a), abs(d)):
                return Orientation(flip_x=bool(a < 0), flip_y=bool(d < 0))
            if max(abs(a), abs(d)) < 0.01 * min(abs(b), abs(c)):
                return Orientation(transpose=True, flip_x=bool(c < 0), flip_y=bool(b < 0))
            raise unusable(path, "it is turned by an angle that is no multiple of 90 degrees")
    return Orientation()
