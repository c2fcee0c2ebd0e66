"""What the GPU does during a few steps of a run: ``log.profile_step``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

NUM_STEPS = 3
Interval = tuple[float, float]
Event = tuple[str, float, float]
"""Name, start and end in microseconds."""


class StepProfiler:
    """Profiles ``NUM_STEPS`` steps from ``first_step`` on (none if it is None) and leaves two files in ``folder``.

    ``trace.json.gz`` opens in Perfetto or chrome://tracing; ``profile.json`` holds ``device_shares`` of a GPU, or on
    a CPU the operators that took longest. A validation or a checkpoint that is due in those steps is part of them.
    ``say`` tells the user where nothing was profiled.
    """

    def __init__(self, first_step: int | None, folder: Path, say: Callable[[str], None]) -> None:
        self._first, self._folder, self._say = first_step, folder, say
        self._last_step = 0
        self._profile: profile | None = None

    def after_step(self, step: int) -> None:
        """Begin and end where it is due. To be called at the end of every step, on one rank."""
        if self._first is None:
            return
        self._last_step = step
        if step == self._first - 1:
            _synchronize()
            on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self._profile.start()
        elif self._profile is not None and step == self._first + NUM_STEPS - 1:
            self.finish()

    def finish(self) -> None:
        """End what was begun; to be called when there are no more steps."""
        if self._profile is not None:
            _synchronize()
            self._profile.stop()
            done, self._profile = self._profile, None
            if self._last_step >= self._first:
                self._write(done)
                self._first = None
        if self._first is not None:
            self._say(
                f"log.profile_step is {self._first}, and no step from it on began and ended here, up to step "
                f"{self._last_step}: nothing was profiled."
            )
            self._first = None

    def _write(self, done: profile) -> None:
        content: dict = {"steps": [self._first, self._last_step]}
        if torch.cuda.is_available():
            content["device_shares"] = device_shares(device_events(done))
        else:
            slowest = sorted(done.key_averages(), key=lambda event: -event.self_cpu_time_total)[:20]
            content["cpu_ms"] = {event.key: event.self_cpu_time_total / 1e3 for event in slowest}
        done.export_chrome_trace(str(self._folder / "trace.json.gz"))
        (self._folder / "profile.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_events(done: profile) -> list[Event]:
    """Return what ran on the GPU, without annotations: spans that hold kernels counted already."""
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in done.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]


def device_shares(events: Iterable[Event]) -> dict[str, float]:
    """Return shares of the time from the first to the last event.

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
