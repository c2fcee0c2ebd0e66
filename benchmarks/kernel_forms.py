"""Whether the rules in ``kernels.cost`` pick the fastest way of computing an adapted linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from device_timing import num_bytes, num_copies, time_calls
from measuring import figures_or_error
from torch import Tensor

from dora_core.adapters.kernels import (
    Projection,
    Settings,
    choose_backward_form,
    choose_dense,
    choose_form,
    fused_linears,
    row_norm,
)

LIMIT = 0.03
"""What the rule may lose against the faster form."""


def form_rows(
    grid: Iterable[tuple[tuple[int, int], int, int]],
    adapters: torch.dtype,
    device: torch.device,
    *,
    full_norm: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each ((in, out), rank, tokens): DoRA in bf16 with A and B in the type ``adapters``.

    ``full_norm``: with a bias and the norm differentiated, where ``dense`` can pay off.
    """
    for (in_features, out_features), rank, tokens in grid:
        row: dict[str, Any] = {"in": in_features, "out": out_features, "tokens": tokens, "rank": rank}
        work = partial(_measured, in_features, out_features, tokens, rank, adapters, device, full_norm)
        yield row | figures_or_error(work, device)


def _measured(
    in_features: int,
    out_features: int,
    tokens: int,
    rank: int,
    adapters: torch.dtype,
    device: torch.device,
    full_norm: bool,
) -> dict[str, Any]:
    def operands() -> tuple[Tensor, ...]:
        half = {"dtype": torch.bfloat16, "device": device}
        weight = torch.empty(out_features, in_features, **half).normal_(0, 0.02)
        lora_A = torch.empty(rank, in_features, dtype=adapters, device=device).normal_(0, 0.01)
        lora_B = torch.empty(out_features, rank, dtype=adapters, device=device).normal_(0, 0.01)
        norm = row_norm(weight, lora_A, lora_B, 2.0)
        trained = [torch.randn(tokens, in_features, **half), lora_A, lora_B, norm * 1.01]
        trained += [torch.zeros(out_features, **half)] if full_norm else []
        return *(tensor.requires_grad_() for tensor in trained), weight, norm, torch.randn(tokens, out_features, **half)

    copies = [operands()]
    copies += [operands() for _ in range(num_copies(num_bytes(copies[0]), device) - 1)]

    def layer(form: str | None) -> Callable[[int], Any]:
        def call(index: int) -> Any:
            x, lora_A, lora_B, magnitude, *bias, weight, norm, dy = copies[index]
            tensors = (weight, bias[0] if bias else None, lora_A, lora_B, magnitude, norm)
            (y,) = fused_linears(x, [Projection(*tensors, Settings(2.0, full_norm, form=form))])
            return torch.autograd.grad(y, (x, lora_A, lora_B, magnitude, *bias), dy)

        return call

    ways = ("composed", "dense") if full_norm else ("merged", "composed")
    times = time_calls([layer(form) for form in (*ways, None)], len(copies), device)
    found = dict(zip((*ways, "rule"), times, strict=True))
    sizes = (tokens, in_features, out_features, rank)
    if full_norm:
        chosen = ("dense" if choose_dense(*sizes, has_bias=True) else "composed",) * 2
    else:
        chosen = (choose_form(*sizes), choose_backward_form(*sizes))
    facts: dict[str, Any] = {"forward": chosen[0], "backward": chosen[1], "num_copies": len(copies)}
    for form, time in found.items():
        facts |= {f"{form}_{key}": value for key, value in vars(time).items()}
    # one form in both directions is what was timed under its name: a second time of it would add noise alone
    taken = found[chosen[0]] if chosen[0] == chosen[1] else found["rule"]
    facts["loss"] = taken.us / min(found[way].us for way in ways) - 1
    return facts


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the worst loss, where it is, and how many points lose more than allowed."""
    known = [row for row in rows if "loss" in row]
    if not known:
        return {}
    worst = max(known, key=lambda row: row["loss"])
    return {
        "num_points": len(known),
        "limit": LIMIT,
        "num_above_limit": sum(row["loss"] > LIMIT for row in known),
        "worst_loss": worst["loss"],
        "worst": {key: worst[key] for key in ("in", "out", "tokens", "rank", "forward", "backward")},
    }
