"""The metrics that any evaluator may use by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dora_core.registry import METRICS


@METRICS.register("accuracy")
def accuracy(predicted: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the share of places, in [0, 1], where ``predicted`` equals ``expected``; None is never equal."""
    _require_pairs("accuracy", predicted, expected)
    hits = sum(given is not None and given == wanted for given, wanted in zip(predicted, expected, strict=True))
    return hits / len(expected)


@METRICS.register("exact_match")
def exact_match(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """Return the share of texts, in [0, 1], that are equal after stripping both ends; case and inner space count."""
    _require_pairs("exact_match", predicted, expected)
    hits = sum(given.strip() == wanted.strip() for given, wanted in zip(predicted, expected, strict=True))
    return hits / len(expected)


def _require_pairs(metric: str, predicted: Sequence[Any], expected: Sequence[Any]) -> None:
    if not expected or len(predicted) != len(expected):
        raise ValueError(
            f"{metric} got {len(predicted)} predictions for {len(expected)} references; it needs as many of one as of "
            "the other, and at least one. Pass one prediction per row, also for rows without an answer."
        )
