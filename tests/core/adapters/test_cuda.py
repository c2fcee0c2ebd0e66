"""The adapters on a GPU: the same promises as on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dora_core.adapters import DoRALinear, LoRALinear, reuse_norms
from dora_core.adapters.functional import row_norm
from dora_core.adapters.kernels import Projection, Settings, fused_linears

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
HALF = (torch.bfloat16, torch.float16)


def make_base(in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, bias=bias, device="cuda")
    nn.init.normal_(base.weight, std=0.02)
    return base.to(dtype)


def disturb(layer: DoRALinear) -> None:
    with torch.no_grad():
        layer.lora_B.normal_(std=0.02)
        layer.magnitude.mul_(torch.rand_like(layer.magnitude) + 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("kernel", ["plain", "fused"])
def test_a_fresh_layer_returns_the_base_layers_output_bit_for_bit(kernel, kind, dtype, bias):
    base = make_base(4096, 11008, dtype, bias=bias)
    x = torch.randn(300, 4096, device="cuda", dtype=dtype)
    expected = base(x)
    layer = kind(base, 32, 64.0, kernel=kernel)
    assert torch.equal(layer(x), expected)
    if kernel == "fused" and not bias:
        layer._known_touched = True  # without looking whether it is fresh
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", HALF)
def test_the_plain_output_is_within_pure_rounding_of_float64(dtype):
    layer = DoRALinear(make_base(4096, 4096, dtype, bias=True), 32, 64.0, kernel="plain")
    disturb(layer)
    x = torch.randn(256, 4096, device="cuda", dtype=dtype)
    weight, a, b, m = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude))
    v = weight + layer.scale * b @ a
    exact = F.linear(x.double(), (m / v.norm(dim=1))[:, None] * v, layer.bias.double())
    rounding = (exact.to(dtype).double() - exact).norm()
    assert (layer(x).double() - exact).norm() <= 1.1 * rounding


@pytest.mark.parametrize("kernel", ["plain", "auto"])
@pytest.mark.parametrize("norm_gradient", ["detached", "full"])
def test_gradients_agree_with_the_cpu(norm_gradient, kernel):
    grads = []
    for device in ("cpu", "cuda"):
        layer = DoRALinear(
            make_base(512, 384, torch.float32, bias=True).to("cpu"), 8, 16.0, norm_gradient=norm_gradient, kernel=kernel
        )
        torch.manual_seed(1)
        disturb(layer)
        layer.to(device)
        torch.manual_seed(2)
        x, dy = torch.randn(64, 512).to(device).requires_grad_(), torch.randn(64, 384).to(device)
        layer(x).backward(dy)
        grads.append([t.grad.cpu() for t in (x, layer.lora_A, layer.lora_B, layer.magnitude)])
    for on_cpu, on_gpu in zip(*grads, strict=True):
        assert (on_cpu - on_gpu).norm() <= 1e-4 * on_cpu.norm()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kernel", ["plain", "fused"])
def test_half_gradients_are_close_to_float64(kernel, dtype):
    layer = DoRALinear(make_base(2048, 1024, dtype, bias=False), 16, 32.0, kernel=kernel)
    disturb(layer)
    x = torch.randn(512, 2048, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(512, 1024, device="cuda", dtype=dtype)
    layer(x).backward(dy)
    a, b, m = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B, layer.magnitude))
    x64 = x.detach().double().requires_grad_()
    v = layer.weight.double() + layer.scale * b @ a
    F.linear(x64, (m / v.norm(dim=1).detach())[:, None] * v).backward(dy.double())
    for own, exact in (
        (x.grad, x64.grad),
        (layer.lora_A.grad, a.grad),
        (layer.lora_B.grad, b.grad),
        (layer.magnitude.grad, m.grad),
    ):
        error = ((own.double() - exact).norm() / exact.norm()).item()
        assert error < (5e-3 if dtype == torch.bfloat16 else 1e-3), error


def test_norms_are_reused_between_fused_optimizer_steps():
    losses = []
    for reuse in (False, True):
        layer = DoRALinear(make_base(256, 128, torch.bfloat16, bias=False), 8, 16.0)
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2, fused=True)
        generator = torch.Generator("cuda").manual_seed(0)

        def run(layer=layer, optimizer=optimizer, generator=generator):
            total = []
            for _ in range(10):
                for _ in range(2):
                    x = torch.randn(32, 256, device="cuda", generator=generator).bfloat16()
                    loss = layer(x).float().square().mean()
                    loss.backward()
                    total.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
            return total

        if reuse:
            with reuse_norms(layer):
                before = layer.num_norms_computed
                losses.append(run())
                assert layer.num_norms_computed - before == 10
        else:
            losses.append(run())
    assert losses[0] == losses[1]


def composition(x, weight, bias, lora_A, lora_B, magnitude, norm, scale):
    """DoRA composed of torch's own operators in the type of x, as PEFT does with adapters of that type."""
    low = F.linear(F.linear(x, lora_A), lora_B)
    y = (magnitude / norm.to(x.dtype)) * (F.linear(x, weight) + scale * low)
    return y if bias is None else y + bias


@pytest.mark.parametrize("form", ["merged", "composed", "dense"])
@pytest.mark.parametrize("change", [0.1, 1e-3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [16, 100])
@pytest.mark.parametrize("sizes", ["one", "extreme"])
def test_errors_are_at_most_one_and_a_half_times_those_of_the_composition_in_bf16(form, change, bias, rank, sizes):
    torch.manual_seed(0)
    scale = 0.7

    def randn(*shape):
        return torch.randn(*shape, device="cuda")

    size = torch.ones(768, device="cuda") if sizes == "one" else torch.logspace(-12, 12, 768, device="cuda")
    weight = (0.02 * randn(768, 1024) * size[:, None]).bfloat16()
    lora_A = (randn(rank, 1024) / 32).bfloat16().requires_grad_()
    lora_B = (0.1 * change * randn(768, rank) * size[:, None]).bfloat16().requires_grad_()
    factors = (lora_A.detach(), lora_B.detach(), scale)
    # m is a number of bf16, and rows of W are stretched until the gain differs from 1 by about ``change``
    magnitude = row_norm(weight, *factors).bfloat16()
    weight = (weight * (magnitude / row_norm(weight, *factors) * (1 + change * randn(768)))[:, None]).bfloat16()
    norm = row_norm(weight, *factors)
    magnitude.requires_grad_()
    x, dy = randn(1024, 1024).bfloat16().requires_grad_(), (randn(1024, 768) / size).bfloat16()
    named = {"x": x, "A": lora_A, "B": lora_B, "m": magnitude}
    if bias:
        named["bias"] = (randn(768) * size).bfloat16().requires_grad_()
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in named.items()}
    v = weight.double() + scale * exact["B"] @ exact["A"]
    y64 = F.linear(exact["x"], (exact["m"] / v.norm(dim=1).detach())[:, None] * v, exact.get("bias"))
    wanted = [y64, *torch.autograd.grad(y64, list(exact.values()), dy.double())]
    # rows of every size count alike: outputs are divided by it, and gradients of parameters multiplied
    weights = [1 / size, 1.0, 1.0, size[:, None], size, size]

    def errors(y):
        found = [y, *torch.autograd.grad(y, list(named.values()), dy)]
        triples = zip(found, wanted, weights, strict=False)
        return [(((f.double() - w) * by).norm() / (w * by).norm()).item() for f, w, by in triples]

    projection = Projection(weight, named.get("bias"), lora_A, lora_B, magnitude, norm, Settings(scale, form=form))
    own = errors(fused_linears(x, [projection])[0])
    reference = errors(composition(x, weight, named.get("bias"), lora_A, lora_B, magnitude, norm, scale))
    for name, ours, theirs in zip(["y", *named], own, reference, strict=True):
        assert ours <= 1.5 * theirs, (name, ours, theirs)


def test_an_unaligned_input_is_computed_as_an_aligned_one():
    layer = DoRALinear(make_base(64, 96, torch.bfloat16, bias=False), 8, 16.0, kernel="fused")
    disturb(layer)
    flat = torch.randn(40 * 64 + 1, device="cuda", dtype=torch.bfloat16)
    for x in (flat[1:], flat[:-1]):
        x = x.view(40, 64).detach().requires_grad_()
        for _ in range(2):  # the second time without asking Triton
            y = layer(x)
            torch.testing.assert_close(y, layer(x.clone()))
            y.sum().backward()


def test_compiling_with_inductor_breaks_no_graph():
    layer = DoRALinear(make_base(256, 512, torch.bfloat16, bias=False), 8, 16.0, kernel="fused")
    disturb(layer)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, layer.lora_A, layer.lora_B, layer.magnitude]
    outputs = [layer(x), torch.compile(layer, fullgraph=True)(x)]
    assert torch.equal(*outputs)
    for a, b in zip(*(torch.autograd.grad(y.float().square().sum(), leaves) for y in outputs), strict=True):
        torch.testing.assert_close(a, b)
