"""Fused kernels for adapted layers on a GPU: where they can run, and the rule that picks a way of computing.

Importing this package needs no Triton; calling ``fused_linears``, ``row_norm`` and ``row_norms`` does.
"""

from dora_core.adapters.kernels.cost import Form, choose_backward_form, choose_dense, choose_form
from dora_core.adapters.kernels.dispatch import (
    casts_factors,
    fused_linears,
    kernel_choice,
    refuse,
    row_norm,
    row_norms,
    why_not_fused,
)
from dora_core.adapters.kernels.kept_outputs import Recomputation, keep_outputs
from dora_core.adapters.kernels.projection import Projection, Settings, Stack

__all__ = [
    "Form",
    "Projection",
    "Recomputation",
    "Settings",
    "Stack",
    "casts_factors",
    "choose_backward_form",
    "choose_dense",
    "choose_form",
    "fused_linears",
    "keep_outputs",
    "kernel_choice",
    "refuse",
    "row_norm",
    "row_norms",
    "why_not_fused",
]
