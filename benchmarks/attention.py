"""Time attention as the pipelines' shapes call it: once a shape is known, and at its first call.

    python benchmarks/attention.py [--output benchmarks/results] [--shapes llava-padded,llava] [--device cpu]

A forward and a backward pass of ``scaled_dot_product_attention`` by backend, ``default`` being torch's own choice.
``again_us`` is the median over 5 loops of 16 calls of one shape (time of the GPU, launches hidden by a sleep);
``first_ms`` is the median over 6 widths never seen before, from the call to the end of the GPU's work: each 8 tokens
wider than the last, those of a backend wider than those of the backends before it. Shapes are rows x heads x queries x
keys x width of a head; "padded" ones have a mask of the keys, as rows of other lengths need.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from device_timing import time_calls
from measuring import RESULTS, figures_or_error, require_known, settings, synced, table, versions, write_json
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from training_runs import iqr

SHAPES: dict[str, tuple[int, int, int, int, int, str]] = {
    "llama": (16, 32, 128, 128, 128, "causal"),
    "llama-padded": (16, 32, 128, 128, 128, "causal, padded"),
    "llava": (16, 32, 744, 744, 128, "causal"),
    "llava-padded": (16, 32, 744, 744, 128, "causal, padded"),
    "vlbart-encoder": (300, 12, 56, 56, 64, "padded"),
    "vlbart-cross": (300, 12, 8, 56, 64, "padded"),
    "vlbart-decoder": (300, 12, 8, 8, 64, "causal"),
}
BACKENDS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
COLUMNS = {
    "shape": "",
    "backend": "",
    "again_us": ".0f",
    "again_us_iqr": ".0f",
    "first_ms": ".1f",
    "first_ms_iqr": ".1f",
}
NUM_FIRST = 6


def main(arguments: list[str] | None = None) -> int:
    """Time what is asked for and write ``attention.json``."""
    own = parse(arguments)
    device = torch.device(own.device)
    rows: list[dict[str, Any]] = []
    for shape, (place, backend) in itertools.product(own.shapes.split(","), enumerate(own.backends.split(","))):
        allowed = BACKENDS[backend]
        with nullcontext() if allowed is None else sdpa_kernel(allowed):
            # widths of its own for each: torch's choice and the backend that it chose prepare themselves together
            widths = range(8 * NUM_FIRST * place + 8, 8 * NUM_FIRST * (place + 1) + 8, 8)
            found = figures_or_error(partial(timed, shape, widths, device), device)
        rows.append({"shape": shape, "backend": backend, **found})
        print(rows[-1], flush=True)
        write_json(own.output / "attention.json", {"environment": versions(), "settings": settings(own), "rows": rows})
    print(table([row for row in rows if "error" not in row], COLUMNS))
    return int(all("error" in row for row in rows))


def timed(shape: str, widths: Iterable[int], device: torch.device) -> dict[str, float]:
    """Return the figures of one shape, and of shapes wider by ``widths``, under the backends that are allowed now."""
    again = time_calls([step(shape, 0, device)], 1, device)[0]
    firsts = [synced(partial(step(shape, wider, device), 0), device)[1] for wider in widths]
    return {
        "again_us": again.us,
        "again_us_iqr": again.iqr_us,
        "first_ms": statistics.median(firsts),
        "first_ms_iqr": iqr(firsts),
    }


def step(shape: str, wider: int, device: torch.device) -> Callable[[int], Any]:
    """Return a forward and backward pass at ``wider`` more queries and keys than the shape has."""
    rows, heads, queries, keys, width, kind = SHAPES[shape]
    queries, keys = queries + wider, keys + wider
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (
        torch.randn(rows, length, heads, width, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for length in (queries, keys, keys)
    )
    mask = None
    if "padded" in kind:
        lengths = torch.linspace(keys // 2, keys, rows, device=device)
        mask = (torch.arange(keys, device=device) < lengths[:, None])[:, None, None].expand(rows, 1, queries, keys)
        mask = mask & torch.ones(queries, keys, dtype=torch.bool, device=device).tril() if "causal" in kind else mask
    grad = torch.randn_like(query)

    def call(_: int) -> None:
        output = scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None and "causal" in kind)
        torch.autograd.grad(output, (query, key, value), grad)

    return call


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    own = parser.parse_args(arguments)
    require_known("shapes", own.shapes, SHAPES, parser)
    require_known("backends", own.backends, BACKENDS, parser)
    return own


if __name__ == "__main__":
    raise SystemExit(main())
