"""Which of the ways of computing an adapted product is faster."""

from __future__ import annotations

from typing import Literal

Form = Literal["merged", "composed", "dense"]

# Fitted to two runs over 100 layers on H200s (kernels.json and kernels_forms.json in benchmarks/results): in both, what
# is chosen is the faster form or within 1.2 % of it, at the 99 and the 100 layers at which just that was timed. What
# ``choose_dense`` alone uses is fitted to 80 layers (kernels_dense.json): it is the faster form or within 0.9 % of it.
BYTES_PER_US = 3.0e6
"""What the kernels that go over a weight or over tokens reach, of 4.2e6 in a plain copy."""
FLOPS_PER_US = 1.6e8
"""What the low-rank products inside them reach, in time of their own."""
PRODUCT_FLOPS_PER_US = 7.0e8
"""What a large product by cuBLAS reaches."""
GEMM_BYTES_PER_US = 4.2e6
"""What a low-rank product by cuBLAS, which adds to its result, reaches: that of a copy."""
GEMM_FLOPS_PER_US = 5.0e8
"""What it reaches, in time of its own."""
LAUNCH_US = 3.6
"""What a kernel takes that has next to nothing to do."""
WEIGHT_US = 4.0
"""What a pass over a weight takes beyond that, because a small weight does not keep a large GPU busy."""
NARROW_WEIGHT_US = 4.0
"""What it takes in addition with a rank below 16, the least that a tile can have: masked loads are slower."""


def _pass_us(
    num_elements: int, rank: int, bytes_per_us: float = BYTES_PER_US, flops_per_us: float = FLOPS_PER_US
) -> float:
    # two bytes are read and two written for each element, and it takes part in ``rank`` multiplications
    return 4 * num_elements / bytes_per_us + 2 * num_elements * rank / flops_per_us


def _weight_us(in_features: int, out_features: int, rank: int) -> float:
    return WEIGHT_US + (NARROW_WEIGHT_US if 0 < rank < 16 else 0.0) + _pass_us(in_features * out_features, rank)


def choose_form(num_tokens: int, in_features: int, out_features: int, rank: int) -> Form:
    """Return how to compute y = g (x W^T + s x A^T B^T) for x [tokens, in] and W [out, in].

    ``merged`` forms g (W + s B A) and multiplies once: one pass over a weight, whatever the number of tokens.
    ``composed`` multiplies by W, then adds and scales: one pass over the output. x A^T is not counted, as the backward
    pass needs it in any case. The estimates are for two-byte elements.
    """
    merged = _weight_us(in_features, out_features, rank)
    return "merged" if merged < _pass_us(num_tokens * out_features, rank) else "composed"


def choose_backward_form(num_tokens: int, in_features: int, out_features: int, rank: int, num_layers: int = 1) -> Form:
    """Return how to compute dx = (g dy) W + s (g dy) B A for dy [tokens, out]: as ``choose_form``.

    ``composed`` writes g dy while dy is read for other gradients: half a pass over the output's gradient. It then adds
    the low-rank parts of all ``num_layers`` layers that share x to dx in one product: a pass over the input's gradient.
    """
    merged = num_layers * _weight_us(in_features, out_features, rank)
    composed = num_layers * _pass_us(num_tokens * out_features, 0) / 2
    composed += _pass_us(num_tokens * in_features, num_layers * rank, GEMM_BYTES_PER_US, GEMM_FLOPS_PER_US)
    return "merged" if merged < composed else "composed"


def choose_dense(num_tokens: int, in_features: int, out_features: int, rank: int, has_bias: bool) -> bool:
    """Return whether a layer whose norm is differentiated should take all its gradients from dL/dW = dy^T x [out, in].

    ``dense`` forms the weight in both directions, takes one more product of the base's size, and goes over dL/dW twice
    to have dm and dL/dV, whose products with A and B are small: five products of [out, in] and r beside what three
    passes take. The other forms have five products of [tokens, r] and a pass over the output in each direction, or over
    the weight instead in the forward pass of a layer without a bias, a weight formed once, and five launches more. Pays
    off in small layers. Layers without a bias were not timed.
    """
    num_elements = in_features * out_features
    weight = WEIGHT_US + _pass_us(num_elements, rank)
    dense = 3 * (WEIGHT_US + _pass_us(num_elements, 0)) + 5 * 2 * num_elements * rank / FLOPS_PER_US
    dense += 2 * num_tokens * num_elements / PRODUCT_FLOPS_PER_US
    composed = _pass_us(num_tokens * out_features, rank)
    others = (composed if has_bias else min(weight, composed)) + _pass_us(num_tokens * out_features, 0) + weight
    others += 2 * num_tokens * rank * (2 * in_features + 2 * out_features) / GEMM_FLOPS_PER_US + 5 * LAUNCH_US
    return dense < others
