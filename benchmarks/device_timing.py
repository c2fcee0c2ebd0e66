"""Time single operations on a GPU: cold operands, launches hidden, medians of several loops."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from training_runs import iqr

SLEEP_CYCLES_PER_S = 2.0e9
"""At least the clock of the GPU, so that it sleeps at least as long as asked."""
MAX_QUEUED = 16
"""Calls of one loop: few enough that their launches fit into the GPU's queue behind a sleeping kernel."""


@dataclass(frozen=True)
class CallTime:
    """Microseconds of one call on the device."""

    us: float
    iqr_us: float
    launch_us: float
    """Of Python, to queue one call."""
    hidden: bool
    """Whether the GPU was still asleep when every loop had been queued, so that no launch is in the time."""


class CallTimer:
    """Times ``call(index)``, which works on copy ``index`` of its operands, in loops over all copies.

    Each loop is queued while the GPU sleeps and lies between two events.
    """

    def __init__(self, call: Callable[[int], Any], num_copies: int, device: torch.device) -> None:
        self._call, self._num_copies, self._cuda = call, num_copies, device.type == "cuda"
        self._place = 0
        self._times: list[float] = []
        self._launches: list[float] = []
        self._hidden = True
        for _ in range(3 if self._cuda else 1):  # the first compiles
            self._queue(1)
        if self._cuda:
            torch.cuda.synchronize()
        seconds = self._queue(4)
        if self._cuda:
            torch.cuda.synchronize()
        self._num_calls = MAX_QUEUED if self._cuda else 1
        self._sleep_s = 1e-3 + 2 * seconds / 4 * self._num_calls

    def _queue(self, num_calls: int) -> float:
        start = time.perf_counter()
        for _ in range(num_calls):
            self._call(self._place % self._num_copies)
            self._place += 1
        return time.perf_counter() - start

    def sample(self) -> None:
        """Time one more loop."""
        if not self._cuda:
            self._times.append(self._queue(self._num_calls) * 1e6 / self._num_calls)
            self._launches.append(self._times[-1])
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(self._sleep_s * SLEEP_CYCLES_PER_S))
        start.record()
        seconds = self._queue(self._num_calls)
        self._hidden &= not start.query()
        end.record()
        torch.cuda.synchronize()
        self._times.append(start.elapsed_time(end) * 1e3 / self._num_calls)
        self._launches.append(seconds * 1e6 / self._num_calls)

    def result(self) -> CallTime:
        """Return the figures over all samples."""
        return CallTime(
            statistics.median(self._times), iqr(self._times), statistics.median(self._launches), self._hidden
        )


def time_calls(calls: Sequence[Callable[[int], Any]], num_copies: int, device: torch.device) -> list[CallTime]:
    """Return a ``CallTime`` of each call; samples take turns, so that a drift of the clock meets all alike."""
    timers = [CallTimer(call, num_copies, device) for call in calls]
    for _ in range(5 if device.type == "cuda" else 2):
        for timer in timers:
            timer.sample()
    return [timer.result() for timer in timers]


def num_copies(num_bytes: int, device: torch.device) -> int:
    """Return how many copies of operands of ``num_bytes`` make four times the L2 cache: 2 to 64; 2 on a CPU."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, max(2, math.ceil(4 * cache / max(1, num_bytes))))


def num_bytes(*values: Any) -> int:
    """Return the bytes of all tensors among the values and in tuples among them."""
    total = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, list | tuple):
            total += num_bytes(*value)
    return total
