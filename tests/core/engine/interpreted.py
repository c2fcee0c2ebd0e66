"""Compare models with Liger's kernels and without, on the CPU: TRITON_INTERPRET=1 python interpreted.py FAMILY...

Prints one JSON object a line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import liger_kernel.ops.rms_norm
import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter

sys.path.insert(0, str(Path(__file__).parent))
from families import adapt, batch, gradients, largest_difference, make

from dora_core.adapters import LoRALinear
from dora_core.engine.liger import replace
from dora_core.engine.loss import summed_cross_entropy

_convert = interpreter._implicit_cvt


def _convert_floats_too(argument):
    # a compiled kernel gets numbers as fp32 scalars, an interpreted one as Python's own, which have no type
    if isinstance(argument, float):
        return tl.tensor(interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32), tl.float32)
    return _convert(argument)


interpreter._implicit_cvt = _convert_floats_too
liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # CUDA's own library is nothing that can be interpreted


def losses_and_gradients(model):
    """Return a loss without and one with weights, and the gradients of their sum."""
    inputs, labels, weights = batch(model)
    losses = [summed_cross_entropy(model, inputs, labels, each) for each in (None, weights)]
    sum(losses).backward()
    return torch.stack(losses).detach(), gradients(model)


def watch_adapters(model) -> list:
    """Return a list that fills with what adapters return, and with a copy of it as it was returned."""
    seen = []
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.register_forward_hook(lambda module, inputs, output: seen.append((output, output.clone())))
    return seen


def compare(family: str, *, full: bool = False, checkpointing: bool = False) -> dict:
    """Return how losses and gradients differ, and what must be true beside."""
    models = []
    for _ in range(2):
        model = adapt(make(family), **({"kind": "full", "targets": ".*"} if full else {}))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        models.append(model)
    report = replace(models[1])
    seen = watch_adapters(models[1])
    (expected, plain), (found, own) = (losses_and_gradients(model) for model in models)
    inputs, _, _ = batch(models[0])
    logits = [model.eval()(**inputs).logits for model in models]
    return {
        "name": "+".join([family, *(["full"] * full), *(["checkpointing"] * checkpointing)]),
        "report": str(report),
        "loss": float(((found - expected).abs() / expected).max()),
        "gradients": largest_difference(own, plain),
        "same_logits": torch.equal(*logits),
        "num_outputs": len(seen),
        "outputs_are_left_alone": all(torch.equal(output, copy) for output, copy in seen),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        family, *flags = name.split("+")
        print(json.dumps(compare(family, **dict.fromkeys(flags, True))), flush=True)
