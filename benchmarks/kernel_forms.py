"""Whether the rule in ``kernels.cost`` picks the faster of the two ways of computing an adapted linear layer."""

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
    choose_form,
    fused_linears,
    row_norm,
)

FORMS = {"merged": "merged", "composed": "composed", "rule": None}
LIMIT = 0.03
"""What the rule may lose against the faster form."""


def form_rows(
    grid: Iterable[tuple[tuple[int, int], int, int]], adapters: torch.dtype, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield a row for each ((in, out), rank, tokens): DoRA in bf16 with A and B in the type ``adapters``."""
    for (in_features, out_features), rank, tokens in grid:
        row: dict[str, Any] = {"in": in_features, "out": out_features, "tokens": tokens, "rank": rank}
        work = partial(_measured, in_features, out_features, tokens, rank, adapters, device)
        yield row | figures_or_error(work, device)


def _measured(
    in_features: int, out_features: int, tokens: int, rank: int, adapters: torch.dtype, device: torch.device
) -> dict[str, Any]:
    def operands() -> tuple[Tensor, ...]:
        half = {"dtype": torch.bfloat16, "device": device}
        weight = torch.empty(out_features, in_features, **half).normal_(0, 0.02)
        lora_A = torch.empty(rank, in_features, dtype=adapters, device=device).normal_(0, 0.01)
        lora_B = torch.empty(out_features, rank, dtype=adapters, device=device).normal_(0, 0.01)
        norm = row_norm(weight, lora_A, lora_B, 2.0)
        trained = [torch.randn(tokens, in_features, **half), lora_A, lora_B, norm * 1.01]
        return *(tensor.requires_grad_() for tensor in trained), weight, norm, torch.randn(tokens, out_features, **half)

    copies = [operands()]
    copies += [operands() for _ in range(num_copies(num_bytes(copies[0]), device) - 1)]

    def layer(form: str | None) -> Callable[[int], Any]:
        def call(index: int) -> Any:
            x, lora_A, lora_B, magnitude, weight, norm, dy = copies[index]
            settings = Settings(2.0, form=form)
            (y,) = fused_linears(x, [Projection(weight, None, lora_A, lora_B, magnitude, norm, settings)])
            return torch.autograd.grad(y, (x, lora_A, lora_B, magnitude), dy)

        return call

    times = time_calls([layer(form) for form in FORMS.values()], len(copies), device)
    found = dict(zip(FORMS, times, strict=True))
    chosen = [choose(tokens, in_features, out_features, rank) for choose in (choose_form, choose_backward_form)]
    facts: dict[str, Any] = {"forward": chosen[0], "backward": chosen[1], "num_copies": len(copies)}
    for form, time in found.items():
        facts |= {f"{form}_{key}": value for key, value in vars(time).items()}
    # one form in both directions is what was timed under its name: a second time of it would add noise alone
    taken = found[chosen[0]] if chosen[0] == chosen[1] else found["rule"]
    facts["loss"] = taken.us / min(found["merged"].us, found["composed"].us) - 1
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
