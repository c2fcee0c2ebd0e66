"""Real files, each frame painted with its number in eight black or white blocks, which survive compression."""

from __future__ import annotations

import logging
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.video import decode
from pipelines.video.decode import VideoError, indices_every, open_video, probe, uniform_indices, verify

MEDIA = Path(__file__).parents[3].parent / "shared/data/media"
HEIGHT, WIDTH, NUM = 64, 128, 40
X264 = "keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"
VFR = [0, 10, 20, 120, 130, 200, 300, 310, 320, 330, 340, 350]  # hundredths of a second

CLIPS: dict[str, tuple[str, dict]] = {  # name: encoder, what else write() is told
    "h264.mp4": ("libx264", {"x264-params": X264}),
    "h264.mkv": ("libx264", {"x264-params": X264}),
    "h264_fragments.mp4": ("libx264", {"x264-params": X264, "container": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264_open.mp4": ("libx264", {"x264-params": f"{X264}:open-gop=1"}),
    "h264_open.mkv": ("libx264", {"x264-params": f"{X264}:open-gop=1"}),
    "h264_refresh.mp4": ("libx264", {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}),
    "h264_interlaced.mp4": ("libx264", {"x264-params": f"{X264}:interlaced=1:tff=1"}),
    "h264_10_bits.mp4": ("libx264", {"x264-params": X264, "pixels": "yuv420p10le"}),
    "h264_4:4:4.mp4": ("libx264", {"x264-params": X264, "pixels": "yuv444p"}),
    "h264_full_range.mp4": ("libx264", {"x264-params": f"{X264}:fullrange=on", "pixels": "yuvj420p"}),
    "h264_bt709.mp4": ("libx264", {"x264-params": f"{X264}:colormatrix=bt709"}),
    "h264_late.mp4": ("libx264", {"x264-params": X264, "first": 45}),
    "h264_late.mkv": ("libx264", {"x264-params": X264, "first": 45}),
    "h264_hidden.mp4": ("libx264", {"x264-params": X264, "first": -5, "container": {"avoid_negative_ts": "disabled"}}),
    "h264_one.mp4": ("libx264", {"x264-params": X264, "num": 1}),
    "h264_vfr.mp4": ("libx264", {"x264-params": X264, "times": VFR}),
    "h264_vfr.mkv": ("libx264", {"x264-params": X264, "times": VFR}),
    "hevc_open.mp4": ("libx265", {"x265-params": "keyint=12:min-keyint=12:bframes=3:log-level=none"}),
    "hevc_open.mkv": ("libx265", {"x265-params": "keyint=12:min-keyint=12:bframes=3:log-level=none"}),
    "hevc_closed.mp4": ("libx265", {"x265-params": "keyint=12:bframes=3:open-gop=0:log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"g": "12", "b": "300k", "deadline": "realtime", "cpu-used": "8"}),
    "vp9.mp4": ("libvpx-vp9", {"g": "12", "b": "300k", "auto-alt-ref": "6", "lag-in-frames": "25", "cpu-used": "5"}),
    "vp8.webm": ("libvpx", {"g": "12", "b": "300k", "deadline": "realtime", "cpu-used": "8"}),
    "av1.mp4": ("libsvtav1", {"g": "12", "preset": "6", "crf": "1", "svtav1-params": "enable-tf=0"}),
    "av1.webm": ("libsvtav1", {"g": "12", "preset": "6", "crf": "1", "svtav1-params": "enable-tf=0"}),
    "mpeg4.mp4": ("mpeg4", {"g": "12", "b": "500k"}),
    "mpeg4_open.mkv": ("mpeg4", {"g": "12", "b": "500k", "bf": "2"}),
    "mjpeg.mkv": ("mjpeg", {"q": "3", "pixels": "yuvj420p"}),
}
FOR_DECORD = (
    "h264.mp4 h264.mkv h264_fragments.mp4 h264_4:4:4.mp4 h264_full_range.mp4 h264_bt709.mp4 h264_late.mp4 "
    "h264_late.mkv h264_one.mp4 h264_vfr.mp4 h264_vfr.mkv vp9.webm vp9.mp4 vp8.webm mpeg4.mp4 mjpeg.mkv"
)


def paint(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width)
    image[..., 1] = np.linspace(0, 255, height)[:, None]
    image[..., 2] = number * 7 % 256
    for bit, (top, left) in enumerate(blocks(height, width)):
        image[top : top + height // 4, left : left + width // 8] = 255 * (number >> bit & 1)
    return image


def read(image: np.ndarray) -> int:
    height, width = image.shape[:2]
    return sum(
        int(image[top + height // 8 - 2 : top + height // 8 + 3, left + width // 16].mean() > 127) << bit
        for bit, (top, left) in enumerate(blocks(height, width))
    )


def blocks(height: int, width: int) -> list[tuple[int, int]]:
    return [(row * height // 2 + height // 8, place * width // 4 + width // 16) for row in (0, 1) for place in range(4)]


def numbers(images: np.ndarray) -> list[int]:
    return [read(image) for image in images]


def write(
    path: Path,
    encoder: str,
    options: dict,
    painted: Callable[[int], np.ndarray] = paint,
    prepare: Callable[[av.VideoStream], None] = lambda stream: None,
) -> Path:
    """Write frames 0, 1, 2 ... of 30 a second; ``options`` hold what is for the encoder and what is for this."""
    if encoder not in av.codecs_available:
        pytest.skip(f"this PyAV has no {encoder}")
    options = dict(options)
    pixels, num, first = options.pop("pixels", "yuv420p"), options.pop("num", NUM), options.pop("first", 0)
    times, container_options = options.pop("times", None), options.pop("container", {})
    rate, base = options.pop("rate", 30), Fraction(1, 100) if times else Fraction(1, 30)
    height, width = painted(0).shape[:2]
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(encoder, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.time_base = base = base if rate == 30 else Fraction(1, rate)
        prepare(stream)
        for number in range(len(times) if times else num):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(painted(number)), format="rgb24")
            frame.pts, frame.time_base = (times[number] if times else number) + first, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def packets(path: Path) -> list[tuple[int, int, bool]]:
    """Return position, size and whether it is a key packet, of each packet."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    folder = tmp_path_factory.mktemp("clips")

    def path_of(name: str) -> Path:
        return folder / name if (folder / name).exists() else write(folder / name, *CLIPS[name])

    yield path_of
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    decode._say_once.cache_clear()


def assert_exact(path: Path, expected: list[int], reader: str = "auto") -> None:
    for index, number in enumerate(expected):
        with open_video(path, reader) as video:
            assert numbers(video.frames([index])) == [number]
    with open_video(path, reader) as video:
        assert video.info.num_frames == len(expected)
        draw = random.Random(0)
        for _ in range(3):
            sparse = [draw.randrange(len(expected)) for _ in range(20)]
            assert numbers(video.frames(sparse)) == [expected[index] for index in sparse]
        for index in sparse:
            assert numbers(video.frames([index])) == [expected[index]]
        halves = np.array_split(np.arange(len(expected)), 2)
        assert [number for half in halves for number in numbers(video.frames(half))] == expected


@pytest.mark.parametrize("name", CLIPS)
def test_each_frame_is_the_one_asked_for_alone_and_in_any_order(name: str, clip: Callable[[str], Path]) -> None:
    path = clip(name)
    info = probe(path)
    assert info.reader == ("decord" if name in FOR_DECORD.split() else "pyav"), info.reason
    assert info.codec == name.partition("_")[0].partition(".")[0]
    assert (info.width, info.height, info.rotation) == (WIDTH, HEIGHT, 0)
    options = CLIPS[name][1]
    expected = list(range(len(options["times"]) if "times" in options else options.get("num", NUM)))
    expected = expected[-min(0, options.get("first", 0)) :]  # what an edit list hides is no frame
    times = np.array(options["times"]) / 100 if "times" in options else np.arange(len(expected)) / 30
    np.testing.assert_allclose(info.timestamps, times, atol=1e-3 if path.suffix != ".mp4" else 1e-9)
    if "times" not in options:
        assert info.duration_s == pytest.approx(len(expected) / 30, abs=2e-3)
    assert_exact(path, expected)
    if info.reader == "decord":
        assert_exact(path, expected, "pyav")


@pytest.mark.parametrize("name", ["h264_open.mp4", "h264_open.mkv", "hevc_open.mp4", "mpeg4_open.mkv"])
def test_decord_alone_would_give_wrong_frames_and_is_refused(name: str, clip: Callable[[str], Path]) -> None:
    path = clip(name)
    with pytest.raises(VideoError, match="not for decord"):
        open_video(path, "decord")
    given = [numbers(decode._Decord(path, probe(path)).frames([index]))[0] for index in range(NUM)]
    wrong = [index for index in range(NUM) if given[index] != index]
    if not wrong:
        pytest.skip("this decord is exact here")
    with open_video(path) as video:
        assert numbers(video.frames(wrong)) == wrong


@pytest.mark.parametrize("name", ["h264.mp4", "h264_open.mp4", "mpeg4.mp4", "vp9.mp4"])
def test_an_index_that_calls_each_frame_a_key_frame_misleads_nobody(
    name: str, clip: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(clip(name).read_bytes().replace(b"stss", b"free"))
    assert probe(path).reader == "pyav"
    assert_exact(path, list(range(NUM)))


def test_packets_that_vp8_does_not_show_are_no_frames(clip: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "hidden.webm"
    with av.open(str(clip("vp8.webm"))) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                data = bytes(packet)
                copy = av.Packet(bytes([data[0] & ~0x10]) + data[1:] if number in (5, 20, 21) else data)
                copy.pts, copy.dts, copy.time_base, copy.is_keyframe = (
                    packet.pts,
                    packet.dts,
                    packet.time_base,
                    (packet.is_keyframe),
                )
                copy.stream = stream
                container.mux(copy)
    assert probe(path).reader == "pyav"
    assert_exact(path, [number for number in range(NUM) if number not in (5, 20, 21)])


def test_of_frames_at_one_time_there_is_one(tmp_path: Path) -> None:
    path = write(tmp_path / "fast.mkv", "libx264", {"x264-params": X264, "rate": 2000})  # MKV counts milliseconds
    info = probe(path)
    assert info.reader == "pyav"
    assert NUM / 2 <= info.num_frames < NUM
    assert (np.diff(info.timestamps) > 0).all()
    with open_video(path) as video:
        found = numbers(video.frames(range(info.num_frames)))
        assert found == sorted(set(found))
        assert [numbers(video.frames([index]))[0] for index in range(info.num_frames)] == found


def test_frames_that_refer_to_what_was_cut_off_are_none(clip: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "cut.mkv"
    with av.open(str(clip("h264_open.mkv"))) as source, av.open(str(path), "w") as container:
        stream, num_keys = container.add_stream_from_template(source.streams.video[0]), 0
        for packet in source.demux(video=0):
            num_keys += packet.is_keyframe
            if packet.size and num_keys > 1:
                packet.stream = stream
                container.mux(packet)
    with open_video(path) as video:
        first = read(video.frames([0])[0])
        assert first > 0
    assert_exact(path, list(range(first, NUM)))


MATRICES = {  # a, b, c, d of the display matrix, degrees clockwise, and what makes an upright frame a stored one
    "clockwise": ((0, 1, -1, 0), 90, lambda image: np.rot90(image, 1)),
    "upside_down": ((-1, 0, 0, -1), 180, lambda image: np.rot90(image, 2)),
    "anticlockwise": ((0, -1, 1, 0), 270, lambda image: np.rot90(image, -1)),
    "mirrored": ((-1, 0, 0, 1), 0, lambda image: image[:, ::-1]),
    "transposed": ((0, 1, 1, 0), 90, lambda image: image.swapaxes(0, 1)),
}


def set_matrix(path: Path, a: float, b: float, c: float, d: float) -> None:
    data = bytearray(path.read_bytes())
    matrix = struct.pack(">9i", int(a * 65536), int(b * 65536), 0, int(c * 65536), int(d * 65536), 0, 0, 0, 1 << 30)
    place = data.index(b"tkhd") + 44
    data[place : place + 36] = matrix
    path.write_bytes(data)


@pytest.mark.parametrize("name", MATRICES)
def test_turned_and_mirrored_frames_come_upright(name: str, tmp_path: Path) -> None:
    matrix, rotation, stored = MATRICES[name]
    path = write(tmp_path / "turned.mp4", *CLIPS["h264.mp4"], painted=lambda number: stored(paint(number)))
    set_matrix(path, *matrix)
    info = probe(path)
    assert (info.width, info.height, info.rotation, info.reader) == (WIDTH, HEIGHT, rotation, "pyav")
    assert_exact(path, list(range(NUM)))
    if name in ("clockwise", "anticlockwise"):  # decord turns these itself: the same way
        with open_video(path) as video:
            known = decode._Decord(path, info).frames([3, 20])
            np.testing.assert_allclose(video.frames([3, 20]).astype(int), known, atol=12)


def test_a_turned_mkv_comes_upright(tmp_path: Path) -> None:
    def turn(stream: av.VideoStream) -> None:
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write how an MKV is turned")
        stream.set_display_rotation(90)  # anticlockwise

    path = write(tmp_path / "turned.mkv", *CLIPS["h264.mkv"], lambda number: np.rot90(paint(number), -1), turn)
    assert probe(path).rotation == 270
    assert_exact(path, list(range(NUM)))


def test_a_video_turned_by_half_a_right_angle_is_refused(clip: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(clip("h264.mp4"), tmp_path))
    set_matrix(path, 0.7, 0.7, -0.7, 0.7)
    with pytest.raises(VideoError, match="multiple of 90"):
        probe(path)


@pytest.mark.parametrize("name", ["h264_vfr.mkv", "h264_vfr.mp4"])
def test_times_choose_frames_by_timestamps_not_by_a_rate(name: str, clip: Callable[[str], Path]) -> None:
    # frames are shown at 0, 0.1, 0.2, 1.2, 1.3, 2.0, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5 s
    with open_video(clip(name)) as video:
        assert 3.5 < video.info.duration_s <= 3.61
        assert numbers(video.frames_at([0, 0.05, 0.1, 0.3, 1.19, 1.2, 1.9999, 2.5, 3.55])) == [
            0,
            0,
            1,
            2,
            2,
            3,
            4,
            5,
            11,
        ]
        assert numbers(video.frames_at([3.4, 0])) == [10, 0]
        for outside in (-0.1, 3.7):
            with pytest.raises(VideoError, match="times must be in"):
                video.frames_at([outside])
        assert indices_every(video.info, 1) == [0, 2, 5, 6]
        assert indices_every(video.info, 0.5) == [0, 2, 2, 4, 5, 5, 6, 11]
        assert indices_every(video.info, 0.5, limit=3) == [2, 5, 6]
        assert indices_every(video.info, 100) == [0]
        with pytest.raises(ValueError, match="above 0"):
            indices_every(video.info, 0)


def test_a_multiple_of_the_frame_time_is_that_frame(clip: Callable[[str], Path]) -> None:
    with open_video(clip("h264.mp4")) as video:
        assert numbers(video.frames_at([number * (1 / 30) for number in range(NUM)])) == list(range(NUM))
    assert indices_every(probe(clip("h264.mp4")), 0.1) == list(range(0, NUM, 3))
    assert indices_every(probe(clip("h264_one.mp4")), 1.5) == [0]


def test_uniform_indices_are_the_middles_of_equal_parts_and_never_repeat() -> None:
    assert uniform_indices(10, 2) == [2, 7]
    assert uniform_indices(100, 4) == [12, 37, 62, 87]
    assert uniform_indices(7, 3) == [1, 3, 5]
    assert uniform_indices(3, 8) == [0, 1, 2]
    assert uniform_indices(1, 1) == [0]
    with pytest.raises(ValueError, match="1 or more"):
        uniform_indices(0, 4)


def test_indices_outside_are_refused_and_none_give_none(clip: Callable[[str], Path]) -> None:
    with open_video(clip("h264.mp4")) as video:
        for index in (-1, NUM):
            with pytest.raises(VideoError, match=f"frame {index} .*frames 0 to {NUM - 1}"):
                video.frames([0, index])
        assert video.frames([]).shape == (0, HEIGHT, WIDTH, 3)
        assert video.frames([5, 5]).dtype == np.uint8


@pytest.mark.parametrize("name", ["h264.mp4", "h264_full_range.mp4", "h264_bt709.mp4", "h264_4:4:4.mp4", "vp9.webm"])
def test_decord_and_pyav_agree_in_colour(name: str, clip: Callable[[str], Path]) -> None:
    indices = [0, 7, 31]
    with open_video(clip(name), "decord") as one, open_video(clip(name), "pyav") as other:
        np.testing.assert_allclose(one.frames(indices).astype(int), other.frames(indices), atol=2)


def test_decord_and_pyav_agree_on_a_filmed_video() -> None:
    path = MEDIA / "flipping_a_pancake.mkv"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with open_video(path) as one, open_video(path, "pyav") as other:
        assert (one.info.reader, one.info.num_frames) == ("decord", 310)
        indices = uniform_indices(one.info.num_frames, 12)
        difference = np.abs(one.frames(indices).astype(int) - other.frames(indices))
        assert difference.mean() < 0.5
        assert difference.max() <= 4


def test_one_sparse_frame_does_not_decode_the_whole_video(clip: Callable[[str], Path]) -> None:
    for name in ("h264.mp4", "h264_open.mkv", "hevc_open.mp4", "vp9.webm"):
        with open_video(clip(name), "pyav") as video:
            video.frames([NUM - 2])
            assert 0 < video.num_decoded <= 25 < NUM
    with open_video(clip("h264.mp4"), "pyav") as video:
        video.frames(list(range(20)))
        video.frames(list(range(20, NUM)))
        assert video.num_decoded == NUM  # on from where it was
    with open_video(clip("h264.mp4")) as video:
        assert video.num_decoded is None


def test_the_choice_of_reader_is_logged_once_per_file(
    clip: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="pipelines.video.decode")
    for _ in range(3):
        for name in ("h264.mp4", "hevc_open.mp4"):
            open_video(clip(name)).close()
    assert len(caplog.messages) == 2
    assert "h264.mp4: decord (h264 in closed groups)" in caplog.messages[0]
    assert "hevc_open.mp4: pyav (decord is not exact with hevc)" in caplog.messages[1]


def test_limits_are_checked_and_named(clip: Callable[[str], Path]) -> None:
    with pytest.raises(VideoError, match=r"128 x 64 pixels .* allowed\. Scale it down"):
        open_video(clip("h264.mp4"), max_pixels=HEIGHT * WIDTH - 1)
    with pytest.raises(VideoError, match=r"lasts 1 s; at most .* 1 s are allowed"):
        open_video(clip("h264.mkv"), max_duration_s=1)
    with pytest.raises(ValueError, match="auto, decord or pyav"):
        open_video(clip("h264.mp4"), "torchcodec")  # type: ignore[arg-type]


@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_a_video_stays_in_its_process_and_ends_when_closed(
    reader: str, clip: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_video(clip("h264.mp4"), reader) as video:
        with pytest.raises(TypeError, match="pass the path"):
            pickle.dumps(video)
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(RuntimeError, match="another process"):
            video.frames([0])
    video.close()
    with pytest.raises(RuntimeError, match="closed"):
        video.frames([0])


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "playlist", "sound", "no_moov", "folder", "avi"])
def test_what_is_no_video_is_an_error_that_names_it(kind: str, clip: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.mp4"
    whole = clip("h264.mp4")
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no video\n" * 100)
    elif kind == "playlist":
        path.write_text(f"ffconcat version 1.0\nfile '{whole}'\n")
    elif kind == "sound":
        write_sound(path)
    elif kind == "no_moov":
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    elif kind == "folder":
        path.mkdir()
    elif kind == "avi":
        write(tmp_path / "clip.avi", "mpeg4", {"b": "500k"}).rename(path)
    for reader in ("auto", "pyav"):
        with pytest.raises(VideoError, match=rf"{kind}.mp4: .*\. A video is a complete .*\. Replace the file"):
            open_video(path, reader)
    with pytest.raises(VideoError):
        probe(str(path))


def test_odd_names_are_files_not_addresses(
    clip: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("http:clip é.mp4", "-y", "concat:a|b.mp4"):
        shutil.copy(clip("h264.mp4"), name)
        for reader in ("decord", "pyav"):
            with open_video(name, reader) as video:
                assert numbers(video.frames([7])) == [7]


def test_of_a_file_that_is_cut_off_what_is_there_is_exact_and_the_rest_is_missed_aloud(
    clip: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = write(tmp_path / "long.mkv", "libx264", {"x264-params": X264, "num": 120})
    for share in (0.3, 0.5):
        path = tmp_path / f"{share}.mkv"
        path.write_bytes(long.read_bytes()[: int(share * long.stat().st_size)])
        with av.open(str(path)) as container:
            expected = numbers([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert 12 < len(expected) < 90
        assert expected[:-4] == list(range(len(expected) - 4))  # what the last frames refer to comes before them
        assert_exact(path, expected)
        assert any(f"{share}.mkv: its frames end" in message for message in caplog.messages)
    path = tmp_path / "cut.mp4"
    options = {"x264-params": X264, "num": 120, "container": {"movflags": "faststart"}}
    whole = write(tmp_path / "whole.mp4", "libx264", options)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with open_video(path) as video:
        assert numbers(video.frames(range(24))) == list(range(24))
        assert video.info.num_frames < 90
        with pytest.raises(VideoError, match="damaged"):
            video.frames([video.info.num_frames - 1])  # refers to what is cut off


def damage(path: Path, source: Path, place: int, size: int) -> None:
    """Zero ``size`` bytes inside one packet, after its headers."""
    data = bytearray(source.read_bytes())
    start = packets(source)[place][0] + 30
    data[start : start + size] = bytes(size)
    path.write_bytes(data)


def test_damage_is_told_by_pyav_and_leaves_other_groups_exact(clip: Callable[[str], Path], tmp_path: Path) -> None:
    path, source = tmp_path / "damaged.mp4", clip("h264.mp4")
    second_key = [place for place, (_, _, is_key) in enumerate(packets(source)) if is_key][1]
    damage(path, source, second_key, 200)
    with pytest.raises(VideoError, match="damaged"):
        verify(path)
    with open_video(path, "pyav") as video:
        assert numbers(video.frames([0, 11, 24, 39])) == [0, 11, 24, 39]
        for index in (12, 15, 23):
            with pytest.raises(VideoError, match=f"frame {index} cannot be decoded"):
                video.frames([index])
        assert numbers(video.frames([30, 5])) == [30, 5]
    verify(source)


def test_a_failing_decord_is_replaced_by_pyav_aloud(
    clip: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, source = tmp_path / "broken.mp4", clip("h264.mp4")
    data = bytearray(source.read_bytes())
    position, size, _ = packets(source)[30]
    data[position : position + size] = b"\xff" * size  # not even a NAL unit
    path.write_bytes(data)
    with open_video(path) as video:
        assert numbers(video.frames([3, 14])) == [3, 14]
        assert video.info.reader == "decord"
        with pytest.raises(VideoError, match="damaged"):
            video.frames(range(24, 36))
        assert video.info.reader == "pyav"
        assert video.info.reason.startswith("decord fails")
        assert numbers(video.frames([3, 38])) == [3, 38]
    assert "pyav from now on" in caplog.text
    with open_video(path, "decord") as video, pytest.raises(VideoError, match="decord fails"):
        video.frames(range(24, 36))


def test_flipped_bytes_are_an_error_or_exact_where_pyav_can_tell(clip: Callable[[str], Path], tmp_path: Path) -> None:
    """FFmpeg's decoder tells most damage of H.264, of which decord conceals much: for that there is ``verify``."""
    source = clip("h264.mp4")
    with open_video(source) as video:
        intact = video.frames(range(NUM))
    draw, silent = random.Random(1), {"auto": 0, "pyav": 0}
    first, last = packets(source)[4][0], packets(source)[-1][0]
    for _ in range(30):
        data = bytearray(source.read_bytes())
        start = draw.randrange(first, last - 100)
        data[start : start + 100] = draw.randbytes(100)
        path = tmp_path / "flipped.mp4"
        path.write_bytes(data)
        for reader in silent:
            try:
                with open_video(path, reader) as video:
                    images = video.frames(range(video.info.num_frames))
                silent[reader] += not np.array_equal(images, intact)
            except VideoError:
                pass
    assert silent["pyav"] <= 8
    assert silent["pyav"] <= silent["auto"]


def test_the_corrupted_example_has_exact_frames_before_its_damage_and_errors_after() -> None:
    path = MEDIA / "corrupted.mp4"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with pytest.raises(VideoError, match="damaged"):
        verify(path)
    expected = []
    with av.open(str(path)) as container, pytest.raises(av.error.InvalidDataError):
        for frame in container.decode(video=0):
            expected.append(frame.to_ndarray(format="rgb24"))
    assert len(expected) > 20
    indices = [0, 13, 20]
    for reader in ("auto", "pyav"):
        with open_video(path, reader) as video:
            assert video.info.num_frames == 50
            difference = np.abs(video.frames(indices).astype(int) - np.stack([expected[index] for index in indices]))
            assert difference.mean() < 0.5
            with pytest.raises(VideoError, match="damaged"):
                video.frames([0, 40])


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is measured on Linux")
@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_opening_and_reading_five_hundred_times_keeps_no_memory(reader: str, clip: Callable[[str], Path]) -> None:
    path = clip("h264.mp4")
    for number in range(500):
        with open_video(path, reader) as video:
            video.frames([1, 14])
        if number == 50:
            before = resident_mib()
    assert resident_mib() - before < 20
