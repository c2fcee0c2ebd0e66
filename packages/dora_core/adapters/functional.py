"""The mathematics of DoRA on plain tensors: row norm, gain, effective weight and the adapted linear product.

Notation: W [out, in] frozen weight, A [r, in] and B [out, r] low-rank factors, s scale, V = W + s B A,
n [out] row norm of V, m [out] magnitude, g = m / n gain (all fp32 at least). arXiv 2402.09353, eq. 5, 6, 7, 11
in row form: the paper writes W as in x out and norms columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_CHUNK_ELEMENTS = 1 << 22


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that sums over ``dtype`` are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def row_chunks(
    weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scale: float
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, V[rows]) in accumulation type; a chunk holds a quarter of the rows at most, or a single row."""
    dtype = accumulation_dtype(weight.dtype)
    num_rows, num_columns = weight.shape
    step = max(1, min(-(-num_rows // 4), MAX_CHUNK_ELEMENTS // max(1, num_columns)))
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        chunk = weight[rows].to(dtype, copy=lora_A is not None)
        if lora_A is not None and lora_B is not None:
            chunk.addmm_(lora_B[rows].to(dtype), lora_A.to(dtype), alpha=scale)
        yield rows, chunk


@torch.inference_mode(False)
@torch.no_grad()
def row_norm(weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scale: float) -> Tensor:
    """Return n [out], the row norms of V = W + s B A.

    V is summed before it is squared, row chunk by row chunk: the cheaper factored form
    ||W||^2 + 2s W.BA + s^2 ||BA||^2 loses all digits where W and s B A nearly cancel. Squares are summed in fp64,
    so rows of very small or very large weights neither underflow nor overflow. The result is an ordinary tensor even
    in inference mode: an evaluation may leave it behind for the next training step.
    """
    norm = torch.empty(weight.shape[0], dtype=accumulation_dtype(weight.dtype), device=weight.device)
    for rows, chunk in row_chunks(weight, lora_A, lora_B, scale):
        norm[rows] = torch.linalg.vector_norm(chunk, dim=1, dtype=torch.float64).to(norm.dtype)
    return norm


def is_alive(norm: Tensor) -> Tensor:
    """Return a mask [out] of the rows whose norm is a normal number; a gain for any other row would be noise or NaN."""
    return norm >= torch.finfo(norm.dtype).tiny


def gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return g = m / n [out]; 1 for a row of zeros, so that it stays as it is and never becomes NaN."""
    alive = is_alive(norm)
    return torch.where(alive, magnitude / torch.where(alive, norm, 1), 1)


@torch.no_grad()
def effective_weight_(
    weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, magnitude: Tensor | None, scale: float
) -> Tensor:
    """Overwrite ``weight`` [out, in] with g V (or V without a magnitude), rounded once to its type; return it."""
    norm = row_norm(weight, lora_A, lora_B, scale) if magnitude is not None else None
    for rows, chunk in row_chunks(weight, lora_A, lora_B, scale):
        weight[rows] = chunk if norm is None else chunk * gain(magnitude[rows].to(norm.dtype), norm[rows])[:, None]
    return weight


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T [..., out] accumulated *and returned* in fp32 (fp64 for fp64), for x [..., in], W [out, in].

    If an operand is of a half type, CUDA runs one GEMM in that type with an fp32 result; elsewhere the operands
    are widened.
    """
    half = next((t.dtype for t in (x, weight) if t.dtype in (torch.bfloat16, torch.float16)), None)
    if x.is_cuda and half is not None:
        flat = torch.mm(x.reshape(-1, x.shape[-1]).to(half), weight.to(half).t(), out_dtype=torch.float32)
        return flat.view(*x.shape[:-1], weight.shape[0])
    dtype = torch.promote_types(accumulation_dtype(x.dtype), weight.dtype)
    return F.linear(x.to(dtype), weight.to(dtype))


class _AdaptedLinear(torch.autograd.Function):
    """y = x W^T + (g - 1) x' W^T + g s x" A^T B^T + bias, rounded once; see ``adapted_linear``."""

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, lora_A, lora_B, magnitude, norm, options):
        scale, update, full_norm, untouched = options
        dtype = accumulation_dtype(x.dtype)
        low_input = x if dropped is None else dropped
        two_inputs = update and dropped is not None
        with torch.autocast(x.device.type, enabled=False):
            base = product(x, weight)
            changed = product(dropped, weight) if two_inputs else base
            hidden = product(low_input, lora_A) if lora_A is not None else None
            low = scale * product(hidden, lora_B) if hidden is not None else None
            g = gain(magnitude, norm) if magnitude is not None else None
            if untouched:  # B = 0 and g = 1: the base layer's own kernel, so that the result is its result bit for bit
                y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            else:
                y = base if g is None else base + (g - 1) * changed
                if low is not None:
                    y = y + (low if g is None else g * low)
                y = (y if bias is None else y + bias.to(dtype)).to(x.dtype)
            scaled = None
            if magnitude is not None and (ctx.needs_input_grad[6] or full_norm):
                scaled = (changed if low is None else changed + low).to(x.dtype)
        kept_input = low_input if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(kept_input, weight, lora_A, lora_B, hidden, g, norm, scaled)
        ctx.options = (scale, two_inputs, full_norm and hidden is not None, dropped is not None)
        ctx.dtypes = (x.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        low_input, weight, lora_A, lora_B, hidden, g, norm, scaled = ctx.saved_tensors
        scale, two_inputs, full_norm, has_dropped = ctx.options
        x_dtype, bias_dtype = ctx.dtypes
        need_x, need_dropped, _, need_bias, need_A, need_B, need_m = ctx.needs_input_grad[:7]
        dx = d_dropped = d_bias = dA = dB = dm = None
        operand = lambda t: t.to(x_dtype) if t.is_cuda else t  # noqa: E731  (CUDA multiplies in the input's type)
        with torch.autocast(dy.device.type, enabled=False):
            dy = dy.to(accumulation_dtype(x_dtype))
            dyg = dy if g is None else dy * g
            if need_bias:
                d_bias = _rows(dy).sum(0).to(bias_dtype)
            if scaled is not None:
                alive = is_alive(norm)
                inverse = torch.where(alive, 1 / torch.where(alive, norm, 1), 0)
                dm = _rows(dy * scaled).sum(0) * inverse  # eq. 7
            if need_x:
                dx = product(operand(dy if two_inputs else dyg), weight.t())
            if two_inputs and need_dropped and g is not None:
                d_dropped = product(operand(dyg - dy), weight.t())
            if hidden is not None:
                dyg = operand(dyg)
                d_hidden = operand(scale * product(dyg, lora_B.t()))
                if need_B:
                    dB = scale * product(_rows(dyg).t(), operand(_rows(hidden)).t())
                if need_A:
                    dA = product(_rows(d_hidden).t(), _rows(low_input).t())
                if need_dropped:
                    d_low = product(d_hidden, lora_A.t())
                    d_dropped = d_low if d_dropped is None else d_dropped + d_low
                elif need_x and not has_dropped:
                    dx = dx + product(d_hidden, lora_A.t())
            if full_norm:
                row_factor = (-g * dm * inverse)[:, None]
                norm_dA, norm_dB = _norm_gradients(row_factor, weight, lora_A, lora_B, scale)
                dA = dA + norm_dA if need_A else None
                dB = dB + norm_dB if need_B else None
        return (
            _cast(dx, x_dtype),
            _cast(d_dropped, x_dtype),
            None,
            d_bias,
            dA if lora_A is None else _cast(dA, lora_A.dtype),
            dB if lora_B is None else _cast(dB, lora_B.dtype),
            dm if need_m else None,
            None,
            None,
        )


def _norm_gradients(
    row_factor: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return what the projection of eq. 6 adds to the gradients of A and B, without forming V or BA.

    The projection is dL/dV += c V with ``row_factor`` c [out, 1] = (dL/dn) / n and dL/dn = -g dL/dm.
    """
    weighted_B = (row_factor * lora_B).t()
    dB = scale * row_factor * (product(weight, lora_A) + scale * lora_B @ (lora_A @ lora_A.t()))
    dA = scale * (product(weighted_B, weight.t()) + scale * (weighted_B @ lora_B) @ lora_A)
    return dA, dB


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropped: Tensor | None = None,
    update_dropout: bool = False,
    full_norm_gradient: bool = False,
    untouched: bool = False,
) -> Tensor:
    """Return the output [..., out] of a LoRA or DoRA linear layer for x [..., in], in x's type.

    Without a magnitude: y = x W^T + s x" A^T B^T + bias (LoRA). With one: y = x W^T + (g - 1) x' W^T
    + g s x" A^T B^T + bias (eq. 5, the bias is never scaled). x" is ``dropped`` if given, else x; x' is x, or
    ``dropped`` with ``update_dropout``. The sum is kept in fp32 and rounded once. Near g = 1 the form with
    (g - 1) does not cancel. Kept for the backward pass beside the input of the low-rank path: one [..., r] and, for
    the gradient of the magnitude, one [..., out] tensor in x's type; nothing of out x in elements.

    ``norm`` is n [out] of the current parameters. Its gradient is left out (eq. 11) unless
    ``full_norm_gradient`` (eq. 6). ``untouched`` promises B = 0 and g = 1. The frozen weight gets no gradient.
    """
    options = (scale, update_dropout, full_norm_gradient, untouched)
    return _AdaptedLinear.apply(x, dropped, weight, bias, lora_A, lora_B, magnitude, norm, options)
