"""The layers: an exact start, one rounding, dropout, odd weights, and the types of what is trained."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_core.adapters import DoRALinear, LoRALinear, adapters_disabled, merge_adapters

HALF = (torch.float16, torch.bfloat16)
KINDS = (LoRALinear, DoRALinear)


def base_layer(inner: int, out: int, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    generator = torch.Generator().manual_seed(inner * 1000 + out)
    base = nn.Linear(inner, out, bias=bias)
    with torch.no_grad():
        base.weight.copy_(0.05 * torch.randn(out, inner, generator=generator))
        if bias:
            base.bias.copy_(torch.randn(out, generator=generator))
    return base.to(dtype)


def inputs(inner: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(inner)
    x = torch.randn(3, 5, inner, generator=generator).to(dtype)
    return {
        "one row": x[0, :1],
        "one vector": x[0, 0],
        "matrix": x[0],
        "three dimensions": x,
        "transposed": x.transpose(0, 1),
        "every second column": torch.randn(4, 2 * inner, generator=generator).to(dtype)[:, ::2],
        "expanded": x[:1].expand(3, 5, inner),
    }


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 48), (33, 1)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_layer_is_the_base_layer_bit_for_bit(
    kind: type, dtype: torch.dtype, bias: bool, shape: tuple[int, int]
) -> None:
    base = base_layer(*shape, bias=bias, dtype=dtype)
    frozen = copy.deepcopy(base).requires_grad_(False)
    layer = kind(base, 4, 8)
    for name, x in inputs(shape[0], dtype).items():
        for needs_grad in (False, True):
            x = x.detach().requires_grad_(needs_grad)
            assert torch.equal(layer(x), frozen(x)), name
        with torch.no_grad():
            assert torch.equal(layer(x), frozen(x)), name
    trained = [layer.lora_A, layer.lora_B] + ([layer.magnitude] if kind is DoRALinear else [])
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    assert layer.weight is base.weight and layer.bias is base.bias


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_layer_is_the_base_layer_under_autocast(kind: type) -> None:
    base = base_layer(16, 8, bias=True)
    x = inputs(16)["matrix"]
    with torch.autocast("cpu", torch.bfloat16):
        want = base(x)
        got = kind(base, 4, 8)(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_gradient_reaches_everything_that_should_move(kind: type) -> None:
    layer = kind(base_layer(6, 5), 2, 4)
    layer(inputs(6)["matrix"]).square().sum().backward()
    assert layer.lora_B.grad.any() and not layer.lora_A.grad.any()
    assert layer.weight.grad is None
    if kind is DoRALinear:
        assert layer.magnitude.grad.any()


def test_the_factors_start_kaiming_uniform_and_zero_and_the_magnitude_as_row_norms() -> None:
    base = base_layer(400, 30)
    layer = DoRALinear(base, 50, 100)
    bound = 1 / math.sqrt(400)  # sqrt(6 / ((1 + 5) * in))
    assert bound * 0.99 < float(layer.lora_A.detach().abs().max()) <= bound
    torch.testing.assert_close(float(layer.lora_A.detach().std()), bound / math.sqrt(3), rtol=0.02, atol=0)
    assert not layer.lora_B.any()
    torch.testing.assert_close(layer.magnitude.detach().double(), base.weight.double().norm(dim=1), rtol=1e-6, atol=0)
    assert layer.scale == 2 and DoRALinear(base, 16, 8, rslora=True).scale == 2


def definition(layer: LoRALinear, x: Tensor) -> Tensor:
    weight = layer.weight.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
    if layer.magnitude is not None:
        weight *= (layer.magnitude.double() / weight.norm(dim=1))[:, None]
    y = x.double() @ weight.T
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_half_layer_is_as_exact_as_pure_rounding(train, kind: type, dtype: torch.dtype, bias: bool) -> None:
    layer = train(kind(base_layer(256, 192, bias=bias, dtype=dtype), 16, 32))
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = definition(layer, x).detach()
    error = (layer(x).detach().double() - exact).norm()
    rounding = (exact.to(dtype).double() - exact).norm()
    assert float(error / rounding) < 1.01  # 1.1 is asked for


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_fp32_layer_is_as_exact_as_a_linear_layer_of_the_exact_weight(train, kind: type) -> None:
    layer = train(kind(base_layer(256, 192, bias=True), 16, 32))
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    exact = definition(layer, x).detach()
    weight = definition(layer, torch.eye(256)).detach() - layer.bias.double()
    plain = F.linear(x, weight.T.float(), layer.bias)
    ratio = (layer(x).detach().double() - exact).norm() / (plain.double() - exact).norm()
    assert float(ratio) < 1.1


@pytest.mark.parametrize("mode", ["lowrank", "update"])
@pytest.mark.parametrize("norm_gradient", ["detached", "full"])
def test_dropout_means_what_its_mode_says_with_the_mask_of_the_seed(train, mode: str, norm_gradient: str) -> None:
    base = base_layer(12, 10, bias=True, dtype=torch.float64)
    layer = train(DoRALinear(base, 3, 6, dropout=0.5, dropout_mode=mode, norm_gradient=norm_gradient))
    x = inputs(12, torch.float64)["three dimensions"].clone().requires_grad_()
    torch.manual_seed(5)
    y = layer(x)
    y.cos().sum().backward()
    names = ("lora_A", "lora_B", "magnitude")
    grads = {"x": x.grad} | {name: getattr(layer, name).grad for name in names}

    leaves = {"x": x.detach().clone().requires_grad_()}
    leaves |= {name: getattr(layer, name).detach().clone().requires_grad_() for name in names}
    torch.manual_seed(5)
    dropped = F.dropout(leaves["x"], 0.5)
    low_rank = layer.scale * leaves["lora_B"] @ leaves["lora_A"]
    norm = (layer.weight + low_rank).norm(dim=1)
    g = (leaves["magnitude"] / (norm if norm_gradient == "full" else norm.detach()))[:, None]
    if mode == "lowrank":
        want = leaves["x"] @ (g * layer.weight).T + dropped @ (g * low_rank).T + layer.bias
    else:
        want = leaves["x"] @ layer.weight.T + dropped @ (g * (layer.weight + low_rank) - layer.weight).T + layer.bias
    want.cos().sum().backward()
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for name, leaf in leaves.items():
        torch.testing.assert_close(grads[name], leaf.grad, rtol=1e-10, atol=1e-12)
    assert torch.equal(layer.eval()(x), layer(x))


def test_dropout_of_plain_lora_is_in_the_low_rank_path_alone(train) -> None:
    layer = train(LoRALinear(base_layer(12, 10, dtype=torch.float64), 3, 6, dropout=0.25))
    x = inputs(12, torch.float64)["matrix"]
    torch.manual_seed(2)
    y = layer(x)
    torch.manual_seed(2)
    want = x @ layer.weight.T + layer.scale * F.dropout(x, 0.25) @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm_gradient", ["detached", "full"])
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-25, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_rows_start_exact_have_finite_gradients_and_go_on_training(
    dtype: torch.dtype, size: float, norm_gradient: str
) -> None:
    base = base_layer(8, 6, bias=True, dtype=dtype)
    with torch.no_grad():
        base.weight[2] *= size / base.weight[2].float().norm()
    layer = DoRALinear(base, 3, 6, norm_gradient=norm_gradient)
    x = inputs(8, dtype)["matrix"].clone().requires_grad_()
    want = base(x)
    assert torch.equal(layer(x), want)
    with torch.no_grad():
        layer.magnitude[0] *= 2  # the general path, with the odd row as it was
        assert torch.equal(layer(x)[:, 2], want[:, 2])
        layer.magnitude[0] /= 2
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B, layer.magnitude], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        x.grad = None
        y = layer(x)
        (y.float() * torch.arange(1.0, 7.0)).mean().backward()
        assert y.isfinite().all()
        for parameter in (x, layer.lora_A, layer.lora_B, layer.magnitude):
            assert parameter.grad.isfinite().all()
        optimizer.step()
    assert layer.lora_B[2].any()
    layer.merge_()
    assert layer.weight.isfinite().all()


def test_a_dead_row_of_a_layer_of_magnitude_alone_stays_dead_without_nan() -> None:
    base = base_layer(8, 6)
    with torch.no_grad():
        base.weight[2] = 0
    layer = DoRALinear(base, 0, 1)
    x = inputs(8)["matrix"].clone().requires_grad_()
    layer(x).square().sum().backward()
    assert layer.magnitude.grad[2] == 0 and layer.magnitude.grad.isfinite().all() and x.grad.isfinite().all()
    with torch.no_grad():
        layer.magnitude += 1
    assert not layer(x)[:, 2].any() and layer(x).isfinite().all()


def test_what_is_trained_stays_fp32_when_the_model_changes_type(train) -> None:
    layer = train(DoRALinear(base_layer(8, 6, bias=True), 3, 6))
    before = {name: getattr(layer, name).detach().clone() for name in ("lora_A", "lora_B", "magnitude")}
    for change in (layer.half, layer.bfloat16, lambda: layer.to(torch.float16), layer.float):
        change()
        for name, value in before.items():
            assert getattr(layer, name).dtype == torch.float32 and torch.equal(getattr(layer, name), value)
    assert layer.half().weight.dtype == torch.float16
    assert layer.double().lora_A.dtype == torch.float64


def test_a_frozen_bias_can_be_trained_when_it_is_asked_for(train) -> None:
    layer = train(DoRALinear(base_layer(8, 6, bias=True, dtype=torch.bfloat16), 3, 6))
    assert not layer.bias.requires_grad and not layer.weight.requires_grad
    layer.bias.requires_grad_(True)
    layer(inputs(8, torch.bfloat16)["matrix"]).sum().backward()
    assert layer.bias.grad.dtype == torch.bfloat16 and torch.equal(layer.bias.grad, torch.full_like(layer.bias, 5))


def test_state_dict_keeps_the_base_keys_and_restores_the_function(train) -> None:
    layer = train(DoRALinear(base_layer(8, 6, bias=True), 3, 6))
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B", "magnitude"}
    other = DoRALinear(base_layer(8, 6, bias=True), 3, 6)
    other.load_state_dict(layer.state_dict())
    x = inputs(8)["matrix"]
    assert torch.equal(other(x), layer(x))


def test_a_fresh_state_loaded_into_a_trained_layer_is_the_base_again_bit_for_bit(train) -> None:
    base = base_layer(96, 80, bias=True)
    layer = DoRALinear(base, 3, 6)
    fresh = copy.deepcopy(layer.state_dict())
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    want = base(x)
    train(layer)
    assert not torch.equal(layer(x), want)
    layer.load_state_dict(fresh)
    assert torch.equal(layer(x), want)


def test_a_layer_can_be_copied_and_pickled(train) -> None:
    layer = train(DoRALinear(base_layer(8, 6), 3, 6))
    x = inputs(8)["matrix"]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x))


def test_disabled_layers_are_the_base_within_the_block_and_after_an_error_adapted_again(train) -> None:
    base = base_layer(8, 6)
    x = inputs(8)["matrix"]
    want = base(x)
    model = nn.Sequential(train(DoRALinear(base, 3, 6)))
    adapted = model(x)
    assert not torch.allclose(adapted, want)
    with pytest.raises(RuntimeError, match="stop"), adapters_disabled(model):
        with adapters_disabled(model):
            pass
        assert torch.equal(model(x), want)
        raise RuntimeError("stop")
    assert torch.equal(model(x), adapted)


def test_disabling_a_merged_adapter_is_refused(train) -> None:
    model = nn.Sequential(train(DoRALinear(base_layer(8, 6), 3, 6)))
    merge_adapters(model)
    with pytest.raises(ValueError, match=r"merged.*unmerge_adapters"), adapters_disabled(model):
        pass
    assert model[0].enabled
