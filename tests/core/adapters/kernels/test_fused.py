"""The fused product against float64: every form, type, rank, size and stride."""

from __future__ import annotations

import pytest
import torch
from fused_cases import error, make

from dora_core.adapters.functional import row_norm as plain_row_norm
from dora_core.adapters.kernels import Projection, Settings, fused_linears, row_norm
from dora_core.adapters.kernels.weight_ops import effective_weight

FORMS = ("merged", "composed", "dense")
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def check(case, form, *, full_norm=False, bound=None):
    y = case.fused(form, full_norm=full_norm)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    gradients = dict(zip(case.leaves, torch.autograd.grad(y, list(case.leaves.values()), dy), strict=True))
    exact, exact_gradients = case.exact(dy, full_norm=full_norm)
    bound = bound or BOUNDS[case.x.dtype]
    assert y.dtype == case.x.dtype and error(y, exact) < bound
    for name, gradient in gradients.items():
        assert gradient.dtype == case.leaves[name].dtype, name
        assert error(gradient, exact_gradients[name]) < 1.5 * bound, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_float64(form, dtype, magnitude, bias, device):
    check(make(34, 70, 90, 5, dtype=dtype, device=device, bias=bias, magnitude=magnitude), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [0, 1, 3, 16, 33, 64, 65, 130, 512])
def test_any_rank_will_do(form, rank, device):
    check(make(20, 72, 40, rank, device=device), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(2, 1, 1), (2, 200, 3), (260, 17, 300), (66, 129, 65)])
def test_any_size_will_do(form, sizes, device):
    check(make(*sizes, 4, device=device), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [4, 70])
@pytest.mark.parametrize("bias", [True, False])
def test_the_norm_can_be_differentiated(form, rank, bias, device):
    check(make(30, 48, 56, rank, device=device, bias=bias), form, full_norm=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("frozen", [("lora_A", "lora_B"), ("lora_A",), ("lora_B",), ("magnitude",), ("x",)])
def test_what_is_frozen_takes_nothing_from_the_other_gradients(form, magnitude, frozen, device):
    case = make(30, 48, 56, 4, device=device, magnitude=magnitude)
    y = case.fused(form)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    exact = case.exact(dy)[1]
    for name in frozen:
        if name in case.leaves:
            case.leaves[name].requires_grad_(False)
    trained = {name: leaf for name, leaf in case.leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(case.fused(form), list(trained.values()), dy)
    for name, gradient in zip(trained, found, strict=True):
        assert error(gradient, exact[name]) < 3e-6, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_may_be_of_the_bases_type(form, dtype, device):
    check(make(34, 70, 90, 6, dtype=dtype, device=device, adapter_dtype=dtype), form)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_may_have_any_strides(form, device):
    case = make(24, 40, 36, 4, device=device)
    case.x = torch.randn(40, 12, 2, device=device).permute(2, 1, 0).requires_grad_()
    case.weight = case.weight.t().contiguous().t()
    case.lora_A = case.lora_A.detach().t().contiguous().t().requires_grad_()
    case.lora_B = case.lora_B.detach().t().contiguous().t().requires_grad_()
    check(case, form)
    y = case.fused(form)
    y.sum().backward()  # dy is one element, expanded
    gradients = case.exact(torch.ones_like(y))[1]
    assert error(case.x.grad, gradients["x"]) < 1e-5 and error(case.magnitude.grad, gradients["magnitude"]) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_at_all_are_no_error(form, device):
    case = make(0, 16, 24, 4, device=device)
    y = case.fused(form)
    assert y.shape == (2, 0, 24)
    y.sum().backward()
    assert all(not leaf.grad.any() for leaf in case.leaves.values())


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_extreme_norm_and_rows_of_zeros(form, device):
    case = make(16, 32, 8, 4, device=device)
    with torch.no_grad():
        sizes = torch.tensor([1.0, 1e-25, 1e18, 0.0, 1e-3, 1.0, 1.0, 1.0], device=device)
        case.weight *= sizes[:, None]
        case.lora_B *= sizes[:, None]
        case.magnitude.copy_(case.norm() * 1.1)
        case.magnitude[5] = 0.0
        case.magnitude[6] = -case.magnitude[6]
    y = case.fused(form)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    gradients = dict(zip(case.leaves, torch.autograd.grad(y, list(case.leaves.values()), dy), strict=True))
    assert not y[..., 3].any() and not gradients["magnitude"][3]
    for name in ("weight", "lora_B", "magnitude"):  # the dead row is none of float64's business
        getattr(case, name).data[3] = 1.0
    exact, exact_gradients = case.exact(dy)
    alive = [row for row in range(8) if row != 3]
    for row in alive:
        if row != 5:
            assert error(y[..., row], exact[..., row]) < 1e-5, row
        assert error(gradients["magnitude"][row], exact_gradients["magnitude"][row]) < 1e-4, row
        if row != 5:
            assert error(gradients["lora_B"][row], exact_gradients["lora_B"][row]) < 1e-4, row


def test_the_norm_is_the_plain_ones_bit_for_bit_without_an_update(device):
    for dtype in BOUNDS:
        weight = (torch.randn(70, 300, device=device) * torch.logspace(-8, 4, 70, device=device)[:, None]).to(dtype)
        assert torch.equal(row_norm(weight, None, None, 0.0), plain_row_norm(weight, None, None, 0.0))


def test_a_weight_that_nearly_cancels_keeps_its_norm(device):
    case = make(2, 64, 48, 48, device=device, adapter_dtype=torch.float32)
    with torch.no_grad():
        case.weight = -case.scale * case.lora_B @ case.lora_A * (1 - 1e-3)
    exact = (case.weight.double() + case.scale * case.lora_B.double() @ case.lora_A.double()).norm(dim=1)
    found = row_norm(case.weight, case.lora_A, case.lora_B, case.scale)
    assert ((found - exact).abs() / exact).max() < 2e-3


def test_a_formed_weight_shows_changes_below_its_rounding(device):
    weight = (0.02 * torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))).to(device, torch.bfloat16)
    norm = row_norm(weight, None, None, 0.0)
    same = effective_weight(weight, None, None, norm, norm, 1.0, torch.bfloat16)
    assert torch.equal(same, weight)  # what is representable stays
    formed = effective_weight(weight, None, None, 1.001 * norm, norm, 1.0, torch.bfloat16)
    assert torch.equal((1.001 * weight.float()).bfloat16(), weight)  # rounding to the nearest would lose the gain
    seen = (formed.double() * weight.double()).sum() / weight.double().square().sum()
    assert abs(seen - 1.001) < 5e-5


@pytest.mark.parametrize("form", [None, "dense"])
def test_the_same_inputs_give_the_same_bits(form, device):
    results = []
    for _ in range(2):
        case = make(300, 64, 96, 8, device=device)
        y = case.fused(form)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(case.leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("form", [None, "dense"])
def test_a_parameter_changed_before_the_backward_pass_is_refused(form, device):
    case = make(8, 16, 16, 4, device=device)
    y = case.fused(form)
    with torch.no_grad():
        case.lora_B.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()


@pytest.mark.parametrize("form", [None, "dense"])
def test_layers_with_one_input_give_what_each_gives_alone(form, device):
    cases = [make(40, 48, out, rank, device=device, bias=bias) for out, rank, bias in
             ((32, 4, False), (64, 0, True), (32, 8, True), (48, 3, False))]  # fmt: skip
    x = cases[0].x
    for case in cases:
        case.x = x
    alone = [case.fused() for case in cases]
    together = fused_linears(
        x,
        [
            Projection(c.weight, c.bias, c.lora_A, c.lora_B, c.magnitude, c.norm(), Settings(c.scale, form=form))
            for c in cases
        ],
    )
    leaves = [leaf for case in cases for name, leaf in case.leaves.items() if name != "x"]
    gradients = [
        torch.autograd.grad(sum(y.square().sum() for y in outputs), [x, *leaves]) for outputs in (alone, together)
    ]
    for a, b in zip([*alone, *gradients[0]], [*together, *gradients[1]], strict=True):
        assert error(a, b.detach().double()) < 1e-5
