"""Which way a call of adapted layers goes: what the cost rule says, where it has a choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dora_core.adapters.kernels.cost import Form, choose_backward_form, choose_dense, choose_form
from dora_core.adapters.kernels.projection import Projection


def is_dense(x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether layers that share x [..., in] are ``dense`` in training: all or none; asked only without dropout.

    fp16 has too little range for a gradient that is summed over tokens before A or B make it small.
    """
    if x.dtype == torch.float16 or any([p.settings.form in ("merged", "composed") for p in projections]):
        return False
    return all([p.settings.form == "dense" or _pays_off(x, p) for p in projections])


def _pays_off(x: Tensor, p: Projection) -> bool:
    out_features, in_features = p.weight.shape
    sizes = (x.numel() // in_features, in_features, out_features, p.rank)
    return p.settings.full_norm and p.rank > 0 and choose_dense(*sizes, p.bias is not None)


def keeps_output(p: Projection, need_m: bool) -> bool:
    """Whether the backward pass needs the output, or the base product: for m's gradient, or through the norm."""
    return p.magnitude is not None and (need_m or (p.settings.full_norm and p.rank > 0))


def forward_form(p: Projection, x: Tensor, seed: Tensor | None, keeps: bool, dense: bool) -> Form:
    """Return how an output is computed, ``merged`` or ``composed``; ``keeps``: as ``keeps_output``."""
    # a formed weight has no base product, and cannot have dropout
    if seed is not None or (keeps and needs_base(p, x)) or p.settings.untouched:
        return "composed"
    out_features, in_features = p.weight.shape
    form = p.settings.form or choose_form(x.numel() // in_features, in_features, out_features, p.rank)
    return "merged" if dense or form == "dense" else form


def needs_base(p: Projection, x: Tensor) -> bool:
    """Whether the magnitude's gradient cannot be taken from the output: it has a bias, or little range as fp16 has."""
    return p.bias is not None or x.dtype == torch.float16


def backward_form(projections: Sequence[Projection], num_tokens: int) -> Form:
    """Return how the gradient of x is computed, for all that share it: ``merged`` or ``composed``."""
    if any([p.settings.full_norm for p in projections]):
        return "merged"  # the weight is needed in any case
    (out_features, in_features), widest = projections[0].weight.shape, projections[0]
    for p in projections[1:]:
        if p.weight.shape[0] > out_features:
            out_features, widest = p.weight.shape[0], p
    sizes = (num_tokens, in_features, out_features, widest.rank)
    form = widest.settings.form or choose_backward_form(*sizes, len(projections))
    return "merged" if form == "dense" else form
