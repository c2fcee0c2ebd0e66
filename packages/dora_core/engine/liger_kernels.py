"""Liger's Triton kernels on a model that exists: the only file that imports liger_kernel.

Legend of shapes: N places that have a label, H width, V vocabulary.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from liger_kernel.ops import LigerRopeFunction
from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward
from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward
from liger_kernel.transformers import LigerPhi3SwiGLUMLP, LigerRMSNorm, LigerSwiGLUMLP
from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
from torch import Tensor, nn

from dora_core.adapters import LoRALinear
from dora_core.engine.loss import rows_per_chunk


def replace_kernels(decoder: nn.Module) -> Counter[str]:
    """Let the layers of ``decoder`` train with Liger's RMSNorm, RoPE and SwiGLU; return how many of each do.

    Liger's own function finds the layers and knows their rounding. Other models keep theirs, and so does this one in
    evaluation mode: what is scored does not depend on Liger.
    """
    with _module_unchanged(sys.modules[type(decoder).__module__]):
        _apply_liger_kernel_to_instance(
            decoder,
            rope=False,  # it would patch the module, for every model
            rms_norm=True,
            swiglu=getattr(decoder.config, "hidden_act", None) in ("silu", "swish"),
            geglu=False,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
        )
    kernels = {
        LigerRMSNorm.forward: ("RMSNorm", LigerRMSNorm.forward),
        LigerSwiGLUMLP.forward: ("SwiGLU", _swiglu_mlp),
        LigerPhi3SwiGLUMLP.forward: ("SwiGLU", LigerPhi3SwiGLUMLP.forward),
    }
    num_replaced: Counter[str] = Counter()
    for module in decoder.modules():
        if (replaced := getattr(module.__dict__.get("forward"), "__func__", None)) in kernels:
            name, kernel = kernels[replaced]
        elif (kernel := _attention_with_rope(type(module).forward)) is not None:
            name = "RoPE"
        else:
            continue
        _use_in_training(module, kernel)
        num_replaced[name] += 1
    return num_replaced


@contextmanager
def _module_unchanged(module: Any) -> Iterator[None]:
    """Afterwards the module has its own classes again, which Liger replaces for models to come."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


def _use_in_training(module: nn.Module, kernel: Callable) -> None:
    plain = type(module).forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (kernel if self.training else plain)(self, *args, **kwargs)

    module.forward = MethodType(forward, module)


def _attention_with_rope(forward: Callable) -> Callable | None:
    """Return an attention's ``forward`` with Liger's RoPE for ``apply_rotary_pos_emb``; None if it calls no such."""
    code = getattr(forward, "__code__", None)
    if code is None or "apply_rotary_pos_emb" not in code.co_names:
        return None
    names = {**forward.__globals__, "apply_rotary_pos_emb": _rope}
    changed = FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    # Liger rotates in place what the projections returned, which an adapter keeps for its magnitude's gradient.
    return LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)


def _swiglu_mlp(self: nn.Module, x: Tensor) -> Tensor:
    layers = (self.gate_proj, self.up_proj)
    keeps = [isinstance(layer, LoRALinear) for layer in layers]
    return self.down_proj(_SwiGLU.apply(*(layer(x) for layer in layers), *keeps))


class _SwiGLU(torch.autograd.Function):
    """silu(gate) up. Liger writes the gradients over gate and up, which an adapter that made them may keep: a copy is
    written over in place of what ``keeps_gate`` and ``keeps_up`` say is kept."""

    @staticmethod
    def forward(ctx, gate, up, keeps_gate, keeps_up):
        gate, up, product = swiglu_forward(gate.contiguous(), up.contiguous())
        ctx.save_for_backward(gate, up)
        ctx.keeps = (keeps_gate, keeps_up)
        return product

    @staticmethod
    def backward(ctx, grad):
        gate, up = (each.clone() if kept else each for each, kept in zip(ctx.saved_tensors, ctx.keeps, strict=True))
        return *swiglu_backward(gate, up, grad.contiguous()), None, None


def linear_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Return Liger's fused linear cross-entropy in fp32, each of ``labels`` [N] times its weight, summed.

    ``hidden`` is [N, H], ``weight`` [V, H], ``bias`` [V]. Logits are made in chunks, once: the forward pass leaves the
    gradients ready. Those of a trained weight are summed in fp32, of terms in the type of the logits, which the
    ``weights`` [N] are rounded to for it.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return _LinearLoss.apply(hidden, weight, bias, labels, weights, torch.is_grad_enabled())


class _LinearLoss(torch.autograd.Function):
    """Liger's public function would compute the gradients of a weighted loss in the backward pass, from new logits."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, weights, wants_gradients):
        needed = [wants_gradients and need for need in ctx.needs_input_grad[:3]]
        (num_rows, width), vocabulary = hidden.shape, weight.shape[0]
        budget = vocabulary * rows_per_chunk(num_rows, vocabulary) // (width * num_rows)  # in units of hidden's size
        of_parameters = needed[1] or needed[2]  # which are sums over tokens, so that weights must be in the terms
        losses, *_, d_hidden, d_weight, d_bias = fused_linear_cross_entropy_forward(
            hidden,
            weight,
            labels,
            bias=bias,
            reduction="none",
            accum_dtype=torch.float32,
            token_grad_output=weights if of_parameters else None,
            compute_gradients=any(needed),
            weight_requires_grad=needed[1],
            chunk_mem_const=max(1, budget),
        )
        if weights is not None:
            losses = losses * weights
            if needed[0] and not of_parameters:
                d_hidden.mul_(weights[:, None])
        found = (d_hidden, d_weight, d_bias)
        ctx.save_for_backward(*(grad if need else None for grad, need in zip(found, needed, strict=True)))
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        return *(each if each is None else each.mul_(grad) for each in ctx.saved_tensors), None, None, None
