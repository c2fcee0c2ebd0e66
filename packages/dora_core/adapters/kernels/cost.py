"""Which of the two ways of computing an adapted product is faster."""

from __future__ import annotations

from typing import Literal

Form = Literal["merged", "composed"]

BYTES_PER_US = 3.0e6
"""What the kernels that go over a weight or over tokens reach on an H200, of 4.3e6 in a plain copy."""
FLOPS_PER_US = 3.0e8
"""What the low-rank products inside them reach, in time of their own."""


def _pass_us(num_elements: int, rank: int) -> float:
    # two bytes are read and two written for each element, and it takes part in ``rank`` multiplications
    return 4 * num_elements / BYTES_PER_US + 2 * num_elements * rank / FLOPS_PER_US


def choose_form(num_tokens: int, in_features: int, out_features: int, rank: int) -> Form:
    """Return how to compute y = g (x W^T + s x A^T B^T) for x [tokens, in] and W [out, in].

    ``merged`` forms g (W + s B A) and multiplies once: one pass over a weight, whatever the number of tokens.
    ``composed`` multiplies by W, then adds and scales: one pass over the output. x A^T is not counted, as the backward
    pass needs it in any case. The estimates are for two-byte elements.
    """
    merged = _pass_us(in_features * out_features, rank)
    return "merged" if merged < _pass_us(num_tokens * out_features, rank) else "composed"


def choose_backward_form(num_tokens: int, in_features: int, out_features: int, rank: int) -> Form:
    """Return how to compute dx = (g dy) W + s (g dy) B A for dy [tokens, out]: as ``choose_form``.

    ``composed`` writes g dy while dy is read for other gradients, and adds the low-rank part to dx: half a pass over
    the output's gradient and one over the input's.
    """
    merged = _pass_us(in_features * out_features, rank)
    composed = _pass_us(num_tokens * out_features, 0) / 2 + _pass_us(num_tokens * in_features, rank)
    return "merged" if merged < composed else "composed"
