"""What the speed benchmarks share: regimes by name, timed steps, rows that survive a kill, tables."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import re
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from training_runs import environment

T = TypeVar("T")
GIB = 1 << 30
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Regime:
    """What one step works on: ``8x2048-ckpt-r32`` is 8 rows of 2048 tokens, activation checkpointing, rank 32."""

    name: str
    batch: int
    tokens: int
    checkpointing: bool
    rank: int

    @classmethod
    def parse(cls, name: str) -> Regime:
        """Read a name such as ``2x2048-r32``. Raises ``ValueError`` if it is none."""
        found = re.fullmatch(r"(\d+)x(\d+)(-ckpt)?-r(\d+)", name)
        if found is None:
            raise ValueError(
                f"The regime {name!r} is none. It must be ROWSxTOKENS[-ckpt]-rRANK. Write for example 8x2048-ckpt-r32."
            )
        return cls(name, int(found[1]), int(found[2]), found[3] is not None, int(found[4]))

    def input_ids(self, vocab: int, device: torch.device) -> Tensor:
        """Return random tokens [B, S], the same at every call."""
        generator = torch.Generator().manual_seed(self.batch * self.tokens)
        return torch.randint(0, vocab, (self.batch, self.tokens), generator=generator).to(device)


def time_steps(step: Callable[[], Any], device: torch.device, num_warmup: int, num_steps: int) -> list[float]:
    """Return how many milliseconds each of ``num_steps`` took, on the device's clock where there is one.

    On a GPU all steps are queued with an event between them, and only then waited for.
    """
    for _ in range(num_warmup):
        step()
    if device.type != "cuda":
        return [_seconds(step) * 1e3 for _ in range(num_steps)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]


def queueing_ms(step: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds until Python has queued a step on an idle GPU, the lesser of two steps'.

    Near the step's own time it means either a step bound by launches or a full queue; well below, one bound by the GPU.
    """
    queued = []
    for _ in range(2):
        queued.append(_seconds(step) * 1e3)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return min(queued)


def _seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


class Memory:
    """Peak of allocated GPU memory above what is allocated when this is made; of no use on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def extra_gib(self) -> float | None:
        """Return the peak in GiB, None on a CPU."""
        return (torch.cuda.max_memory_allocated() - self._before) / GIB if self._cuda else None


def figures_or_error(work: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Return what ``work`` returns, or the ``error`` it raised: what fails must not lose the other rows.

    Memory that nothing refers to any more is given back.
    """
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def versions() -> dict[str, Any]:
    """Return hardware and versions, those of peers and compilers included."""
    found: dict[str, Any] = environment()
    if not torch.cuda.is_available():
        found["num_threads"] = torch.get_num_threads()
    for package in ("peft", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def require_known(what: str, names: str, known: Iterable[str], parser: argparse.ArgumentParser) -> None:
    """End in ``parser``'s error unless all names, separated by commas, are ``known``."""
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        parser.error(f"no such {what}: {', '.join(unknown)}; there are {', '.join(known)}")


def synced(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Return the result of ``work`` and its milliseconds by the host's clock, with the GPU idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, 1e3 * (time.perf_counter() - start)


def settings(own: argparse.Namespace) -> dict[str, Any]:
    """Return the command line's values that a result depends on."""
    return {key: value for key, value in vars(own).items() if key not in ("output", "name", "plot_only")}


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` at once or not at all; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(_finite(content), indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(aside, path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """Return rows as a Markdown table; ``columns`` maps keys to format specifications. What is missing is a dash."""

    def cell(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(key), form) for key, form in columns.items()) + " |" for row in rows]
    return "\n".join(lines)
