"""What the GPU does during a few steps of a run: ``log.profile_step``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

NUM_STEPS = 3
Interval = tuple[float, float]


class StepProfiler:
    """Profiles ``NUM_STEPS`` steps from ``first_step`` on (none if it is None) and leaves two files in ``folder``.

    ``trace.json.gz`` opens in Perfetto or chrome://tracing; ``profile.json`` holds ``device_shares`` of a GPU, or on
    a CPU the operators that took longest.
    """

    def __init__(self, first_step: int | None, folder: Path) -> None:
        self._first, self._folder = first_step, folder
        self._profile: profile | None = None

    def after_step(self, step: int) -> None:
        """Begin and end where it is due. To be called after every step, on one rank."""
        if self._first is None:
            return
        on_gpu = torch.cuda.is_available()
        if step == self._first - 1:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            self._profile = profile(activities=activities)
            self._profile.start()
        elif self._profile is not None and step == self._first + NUM_STEPS - 1:
            if on_gpu:
                torch.cuda.synchronize()
            self._profile.stop()
            self._write(self._profile, on_gpu)
            self._profile = None

    def _write(self, done: profile, on_gpu: bool) -> None:
        content: dict = {"steps": [self._first, self._first + NUM_STEPS - 1]}
        if on_gpu:
            events = [
                (event.name, event.time_range.start, event.time_range.end)
                for event in done.events()
                if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
            ]
            content["device_shares"] = device_shares(events)
        else:
            slowest = sorted(done.key_averages(), key=lambda event: -event.self_cpu_time_total)[:20]
            content["cpu_ms"] = {event.key: event.self_cpu_time_total / 1e3 for event in slowest}
        done.export_chrome_trace(str(self._folder / "trace.json.gz"))
        (self._folder / "profile.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def device_shares(events: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Return shares of the time from the first to the last of (name, start, end).

    ``communication`` is the time in which any of NCCL's kernels runs (they wait for other ranks too), ``exposed`` the
    part of it in which nothing else does, ``idle`` the time in which nothing runs at all.
    """
    all_events = list(events)
    nccl = union((start, end) for name, start, end in all_events if "nccl" in name.lower())
    others = union((start, end) for name, start, end in all_events if "nccl" not in name.lower())
    busy = union([*nccl, *others])
    if not busy:
        return {"communication": 0.0, "exposed": 0.0, "idle": 0.0}
    span = busy[-1][1] - busy[0][0]
    return {
        "communication": length(nccl) / span,
        "exposed": (length(busy) - length(others)) / span,
        "idle": 1 - length(busy) / span,
    }


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return disjoint intervals, in order, that cover the same."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Sequence[Interval]) -> float:
    """Return how much disjoint intervals cover."""
    return sum(end - start for start, end in intervals)
