"""The namespace ``torch.ops.dora_core``, in which ``torch.compile`` traces the fused kernels without a graph break."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.library import Library

LIBRARY = Library("dora_core", "DEF")


def register(schema: str, function: Callable, fake: Callable) -> Callable:
    """Make ``function`` the operator ``schema`` on every device, with ``fake`` as the rule for its result's shape.

    Returns what to call: the operator while ``torch.compile`` traces, else the function itself. Keyword arguments are
    permissions that only the function takes, such as to write to an argument, which no traced operator may.
    """

    name = schema.partition("(")[0]

    @wraps(function)
    def call(first: Tensor, *others, **permissions):
        if torch.compiler.is_compiling():  # the dispatcher would cost as much as a launch; only tracing needs it
            return operator(first, *others)
        if first.is_cuda and first.get_device() != torch._C._cuda_getDevice():
            with torch.cuda.device(first.device):
                return function(first, *others, **permissions)
        return function(first, *others, **permissions)

    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dora_core::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.dora_core, name).default
    return call
