"""How fast a run is: steps, tokens and waiting since the last report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from dora_core.training.progress import Progress

T = TypeVar("T")


class Speedometer:
    """Measures from ``restart`` to ``read``; what happens between a report and a restart is not counted."""

    def __init__(self) -> None:
        self.restart(Progress())

    def restart(self, progress: Progress) -> None:
        """Begin to measure at ``progress``."""
        self._started = time.perf_counter()
        self._first = (progress.step, progress.num_tokens)
        self._waited_s = 0.0

    def waiting_for(self, items: Iterable[T]) -> Iterator[T]:
        """Pass items through and count the time spent waiting for them."""
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited_s += time.perf_counter() - started
            yield item

    def read(self, progress: Progress) -> dict[str, float]:
        """Return tokens/s, seconds per step, the share of time spent waiting for data and, on a GPU, the peak GiB."""
        seconds = time.perf_counter() - self._started
        values = {
            "tokens_per_s": (progress.num_tokens - self._first[1]) / seconds,
            "step_time_s": seconds / max(1, progress.step - self._first[0]),
            "data_wait": self._waited_s / seconds,
        }
        if torch.cuda.is_available():
            values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return values
