"""The adapters on a GPU: the same promises as on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dora_core.adapters import DoRALinear, LoRALinear, reuse_norms

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
def test_a_fresh_layer_returns_the_base_layers_output_bit_for_bit(kind, dtype, bias):
    base = make_base(4096, 11008, dtype, bias=bias)
    x = torch.randn(300, 4096, device="cuda", dtype=dtype)
    expected = base(x)
    assert torch.equal(kind(base, 32, 64.0)(x), expected)


@pytest.mark.parametrize("dtype", HALF)
def test_the_output_is_within_pure_rounding_of_float64(dtype):
    layer = DoRALinear(make_base(4096, 4096, dtype, bias=True), 32, 64.0)
    disturb(layer)
    x = torch.randn(256, 4096, device="cuda", dtype=dtype)
    weight, a, b, m = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude))
    v = weight + layer.scale * b @ a
    exact = F.linear(x.double(), (m / v.norm(dim=1))[:, None] * v, layer.bias.double())
    rounding = (exact.to(dtype).double() - exact).norm()
    assert (layer(x).double() - exact).norm() <= 1.1 * rounding


@pytest.mark.parametrize("norm_gradient", ["detached", "full"])
def test_gradients_agree_with_the_cpu(norm_gradient):
    grads = []
    for device in ("cpu", "cuda"):
        layer = DoRALinear(
            make_base(512, 384, torch.float32, bias=True).to("cpu"), 8, 16.0, norm_gradient=norm_gradient
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
def test_half_gradients_are_close_to_float64(dtype):
    layer = DoRALinear(make_base(2048, 1024, dtype, bias=False), 16, 32.0)
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
