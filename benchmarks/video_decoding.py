"""Measure how fast one process decodes videos: frames/s with decord and with PyAV, sparse and in a row.

    python benchmarks/video_decoding.py --output runs/bench [--seconds 60] [--repeats 5]

On generated H.264 clips of 30 frames/s in groups of up to 250 frames, as x264 makes them, of 640 x 360 and 224 x 224
pixels. Sparse is one frame per 1.5 s and in a row is all frames, each 32 at a time and with opening the file. Each
figure is the median of ``--repeats`` passes after one of warm-up, with the spread of the passes; the readers' frames
are compared, too. Both decode on one thread, as in a worker that prepares batches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np
from training_runs import environment, iqr

from pipelines.video.decode import indices_every, open_video, probe

FPS = 30
SPARSE_S = 1.5
CHUNK = 32
SIZES = ((640, 360), (224, 224))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    own = parser.parse_args()
    own.output.mkdir(parents=True, exist_ok=True)
    results = []
    print(f"{'clip':>10} {'what':>8} {'reader':>7} {'frames/s':>9} {'iqr':>7} {'ms a pass':>10}")
    for width, height in SIZES:
        clip = own.output / f"clip_{width}x{height}_{own.seconds}s.mp4"
        if not clip.is_file():
            write_clip(clip, width, height, own.seconds)
        info = probe(clip)
        for what, indices in (("sparse", indices_every(info, SPARSE_S)), ("in a row", range(info.num_frames))):
            for reader in ("decord", "pyav"):
                seconds = timed(own.repeats, read, clip, reader, indices)
                rates = [len(indices) / value for value in seconds]
                row = {"width": width, "height": height, "what": what, "reader": reader, "num_frames": len(indices)}
                row |= {"frames_per_s": statistics.median(rates), "iqr": iqr(rates)}
                results.append(
                    row | {"pass_s": statistics.median(seconds), "difference": difference(clip, indices[:40])}
                )
                rate, pass_ms = row["frames_per_s"], 1000 * results[-1]["pass_s"]
                print(
                    f"{width:>6}x{height} {what:>8} {reader:>7} {rate:9.1f} {row['iqr']:7.1f} {pass_ms:10.1f}",
                    flush=True,
                )
        seconds = timed(own.repeats, probe, clip)
        results.append({"width": width, "height": height, "what": "probe", "pass_s": statistics.median(seconds)})
        print(f"{width:>6}x{height} {'probe':>8} {'':>25} {1000 * statistics.median(seconds):10.1f}")
    versions = {"av": av.__version__, "decord": version("decord")}
    report = {"environment": environment() | versions, "num_cpus": os.cpu_count(), "arguments": vars(own)}
    text = json.dumps(report | {"results": results}, indent=2, default=str)
    (own.output / "video_decoding.json").write_text(text + "\n", encoding="utf-8")


def timed(num_repeats: int, do: Callable[..., object], *arguments: object) -> list[float]:
    """Return the seconds of each call after one of warm-up."""
    seconds = []
    for _ in range(num_repeats + 1):
        started = time.perf_counter()
        do(*arguments)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def read(clip: Path, reader: str, indices: Sequence[int]) -> None:
    """Open a clip and decode frames, some at a time, as a data worker does."""
    with open_video(clip, reader) as video:
        for start in range(0, len(indices), CHUNK):
            video.frames(indices[start : start + CHUNK])


def difference(clip: Path, indices: Sequence[int]) -> int:
    """Return the largest difference between the readers' pixels, of values in [0, 255]."""
    with open_video(clip, "decord") as one, open_video(clip, "pyav") as other:
        return int(np.abs(one.frames(indices).astype(int) - other.frames(indices).astype(int)).max())


def write_clip(path: Path, width: int, height: int, seconds: int) -> None:
    """Write moving waves with some noise: about as hard to code as what a camera sees."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:height, 0:width]
    noise = random.integers(-12, 12, (8, height, width, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * FPS):
            phases = (columns + 3 * number, rows - 2 * number, columns + rows + number)
            waves = np.stack([np.sin(phase / (24 + 9 * place)) for place, phase in enumerate(phases)], axis=-1)
            image = np.clip(128 + 100 * waves + noise[number % 8], 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
