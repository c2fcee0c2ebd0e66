"""Adapted layers on the fused kernels: what they keep, reuse and share, and how they are chosen."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_core.adapters import AdapterConfig, DoRALinear, LoRALinear, apply_adapters, reuse_norms, shared_norms
from dora_core.adapters.kernels import (
    choose_backward_form,
    choose_dense,
    choose_form,
    dispatch,
    forms,
    fused,
    gradient_ops,
    low_rank,
    token_ops,
    weight_ops,
)
from dora_core.adapters.kernels.cost import Form


class Block(nn.Module):
    """Four projections: q, k, v of one input, and one of their sum."""

    def __init__(self, kind: type[LoRALinear] = DoRALinear, **options):
        super().__init__()
        for number, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
            torch.manual_seed(number)
            layer = kind(nn.Linear(16, 16, bias=False), 4, 8.0, **options)
            nn.init.normal_(layer.lora_B, std=0.1)
            setattr(self, name, layer)

    def forward(self, x):
        return self.o_proj(torch.tanh(self.q_proj(x) * self.k_proj(x)) + self.v_proj(x))


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """How many layers each fused call computes."""
    seen: list[int] = []
    original = fused.fused_linears

    def spy(x, layers, dropout=0.0):
        seen.append(len(layers))
        return original(x, layers, dropout)

    monkeypatch.setattr(fused, "fused_linears", spy)
    return seen


def train(model: nn.Module, num_steps: int = 4, *, checkpointed: bool = False, device: str = "cpu") -> list[float]:
    model.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).to(device)
    losses = []
    with reuse_norms(model):
        for _ in range(num_steps):
            for _ in range(2):
                inner = x.clone().requires_grad_()
                y = checkpoint(model, inner, use_reentrant=False) if checkpointed else model(inner)
                loss = y.square().mean()
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_is_that_of_the_plain_path_with_one_norm_a_step(checkpointed, sizes, device):
    plain, own = Block(kernel="plain"), Block(kernel="fused")
    expected = train(plain, checkpointed=checkpointed, device=device)
    assert train(own, checkpointed=checkpointed, device=device) == pytest.approx(expected, rel=1e-5)
    assert [layer.num_norms_computed for layer in own.children()] == [4] * 4
    assert sizes[:4] == [1] * 4 and sizes[-2:] == [3, 1]  # the first step sees who shares an input


def test_factors_are_cast_and_joined_once_a_step(device):
    block = Block(kernel="fused").to(device, torch.bfloat16)
    stacks, factors = [], []
    with reuse_norms(block) as reuse:
        for _ in range(3):
            for _ in range(2):
                x = torch.randn(3, 16, device=device, dtype=torch.bfloat16)
                block(x).sum().backward()
                stacks.append(block.q_proj._stack)
                factors.append((stacks[-1].lora_A(), stacks[-1].lora_B(0)))
            with torch.no_grad():
                block.q_proj.lora_B.data.mul_(2)
            reuse.parameters_changed()
        assert block.q_proj._stack is None
    assert len(stacks[-1]) == 3 and factors[-1][0].shape == (12, 16)
    for first, second in zip(factors[::2], factors[1::2], strict=True):
        assert all(a is b and a.dtype == torch.bfloat16 for a, b in zip(first, second, strict=True))
    assert torch.equal(factors[2][1] * 2, factors[4][1])


def test_siblings_with_other_inputs_are_computed_alone(sizes, device):
    class Cross(Block):
        def forward(self, x):
            other = torch.flip(x, (0,))
            return self.o_proj(torch.tanh(self.q_proj(x) * self.k_proj(other)) + self.v_proj(other))

    expected = train(Cross(kernel="plain"), device=device)
    assert train(Cross(kernel="fused"), device=device) == pytest.approx(expected, rel=1e-5)
    assert sizes[-3:] == [1, 2, 1]


def test_a_sibling_that_no_longer_comes_is_no_longer_expected(sizes, device):
    block = Block(kernel="fused").to(device)
    x = torch.randn(3, 16, device=device)
    with reuse_norms(block) as reuse:
        for skips in (False, True, True):
            block.q_proj(x), block.k_proj(x)
            if not skips:
                block.v_proj(x)
            reuse.parameters_changed()
            x = x.clone()
    assert sizes == [1, 1, 1, 3, 2]


def test_an_edit_between_two_siblings_reaches_the_second(device):
    block = Block(kernel="fused").to(device)
    x = torch.randn(3, 16, device=device)
    with reuse_norms(block) as reuse, torch.no_grad():
        block.q_proj(x), block.k_proj(x)
        reuse.parameters_changed()
        block.q_proj(x)
        block.k_proj.lora_B.mul_(2)
        second = block.k_proj(x)
    torch.testing.assert_close(second, block.k_proj(x))


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """How norms are asked for: ``alone`` or ``together``."""
    seen: list[str] = []
    for name, how in (("row_norm", "alone"), ("row_norms", "together")):
        function = getattr(weight_ops, name)
        monkeypatch.setattr(weight_ops, name, lambda *a, f=function, how=how: (seen.append(how), f(*a))[1])
    return seen


def test_layers_of_equal_sizes_have_their_norms_computed_in_one_launch(launches, device):
    block = Block(kernel="fused").to(device)
    x = torch.randn(3, 16, device=device)
    expected = [layer.projection().norm for layer in block.children()]
    launches.clear()
    with reuse_norms(block) as reuse, torch.no_grad():
        for _ in range(2):
            block(x), block(x)
            reuse.parameters_changed()
            assert launches == ["together"]
            launches.clear()
        block(x)
        assert all(
            torch.equal(layer.projection().norm, norm) for layer, norm in zip(block.children(), expected, strict=True)
        )
    block(x)
    assert launches == ["together", *["alone"] * 4]


def test_norms_of_large_ranks_in_half_types_are_computed_together_too(launches, device, monkeypatch):
    torch.manual_seed(0)
    block = nn.ModuleList([DoRALinear(nn.Linear(16, 24, bias=False).bfloat16(), 72, 8.0) for _ in range(5)]).to(device)
    for layer in block:
        nn.init.normal_(layer.lora_B)
    monkeypatch.setattr(shared_norms, "MAX_CAST", 2 * (16 + 24) * 72)  # two at once
    norms = [layer.projection().norm for layer in block]
    launches.clear()
    with reuse_norms(block):
        assert all(torch.equal(layer.projection().norm, norm) for layer, norm in zip(block, norms, strict=True))
    assert launches == ["together", "together", "alone"]


@pytest.mark.parametrize("how", ["in place", "replaced", "scale", "converted"])
def test_a_layer_that_changed_while_its_norm_was_waiting_computes_it_again(how, launches, device):
    block = Block(kernel="fused").to(device)
    x = torch.randn(3, 16, device=device)
    layer = block.k_proj
    with reuse_norms(block), torch.no_grad():
        block.q_proj(x)
        if how == "in place":
            layer.lora_B.mul_(2)
        elif how == "replaced":
            layer.lora_B = nn.Parameter(2 * layer.lora_B)
        elif how == "scale":
            layer.scale *= 2
        else:
            layer.float()
        norm = layer.projection().norm
        block.v_proj(x)
    assert launches == ["together", "alone"]
    torch.testing.assert_close(norm, layer.projection().norm)


@pytest.mark.parametrize("how", ["other sizes", "other scale", "replaced by a view"])
def test_layers_that_are_no_longer_alike_have_norms_of_their_own(how, launches, device):
    block = Block(kernel="fused").to(device)
    with reuse_norms(block) as reuse, torch.no_grad():
        block(torch.randn(3, 16, device=device))
        if how == "other sizes":
            block.k_proj.lora_A = nn.Parameter(torch.randn(2, 16, device=device))
            block.k_proj.lora_B = nn.Parameter(torch.randn(16, 2, device=device))
        elif how == "other scale":
            block.k_proj.scale *= 2
        else:
            block.k_proj.lora_A = nn.Parameter(torch.randn(16, 4, device=device).t())
        reuse.parameters_changed()
        launches.clear()
        norms = [layer.projection().norm for layer in block.children()]
    assert launches == ["alone"] * 4
    for norm, layer in zip(norms, block.children(), strict=True):
        torch.testing.assert_close(norm, layer.projection().norm)


def test_inference_mode_leaves_norms_that_training_can_use(device):
    block = Block(kernel="fused").to(device)
    x = torch.randn(3, 16, device=device)
    with reuse_norms(block):
        with torch.inference_mode():
            scored = block(x + 0)
        trained = block(x.requires_grad_())
        trained.sum().backward()
    torch.testing.assert_close(scored, trained.detach())


def test_inner_blocks_leave_the_outer_ones_sharing(device):
    block = Block(kernel="fused").to(device)
    with reuse_norms(block):
        outer = block.q_proj.shared_input
        with reuse_norms(block):
            assert block.q_proj.shared_input is outer
        assert block.q_proj.shared_norms is not None
        assert copy.deepcopy(block).q_proj.shared_norms is None
        assert block.q_proj.shared_input is outer is not None
        assert copy.deepcopy(block).q_proj.shared_input is None
    assert block.q_proj.shared_input is None
    assert block.q_proj.shared_norms is None


@pytest.mark.parametrize("how", ["in place", "data", "load", "gathered"])
def test_changed_parameters_change_the_norm(how, device):
    layer = Block(kernel="fused").q_proj.to(device)
    x = torch.randn(5, 16, device=device)
    with torch.no_grad(), reuse_norms(layer) as reuse:
        before = layer(x)
        if how == "in place":
            layer.lora_A.mul_(3)
        elif how == "data":
            layer.lora_A.data.mul_(3)
            reuse.parameters_changed()
        elif how == "load":
            layer.load_state_dict({name: 3 * t if name == "lora_A" else t for name, t in layer.state_dict().items()})
        else:  # ZeRO-3 puts other storage behind the parameter, and its optimizer announces the step
            layer.lora_A.data = 3 * layer.lora_A.data
            reuse.parameters_changed()
        after = layer(x)
    assert not torch.equal(before, after)
    layer.kernel = "plain"
    torch.testing.assert_close(after, layer(x))


@pytest.mark.parametrize("form", ["merged", "composed"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_what_is_kept_for_the_backward_pass(form, dropout, kind, device, monkeypatch):
    monkeypatch.setattr(forms, "choose_form", lambda *_: form)
    num_tokens, in_features, out_features, rank = 40, 64, 96, 4
    layer = kind(nn.Linear(in_features, out_features, bias=False), rank, 8.0, dropout=dropout, kernel="fused")
    nn.init.normal_(layer.lora_B)
    layer.to(device)
    x = torch.randn(num_tokens, in_features, device=device, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = layer(x)
    beyond = sum(t.numel() for t in saved if t.data_ptr() not in (x.data_ptr(), y.data_ptr()))
    small = num_tokens * rank + 1  # hidden, and the seed of the dropout mask
    one_output = num_tokens * out_features if kind is DoRALinear and (form == "composed" or dropout) else 0
    assert beyond <= one_output + small
    assert all(t.numel() < in_features * out_features for t in saved)
    y.sum().backward()


def small_layer(**options) -> DoRALinear:
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(64, 96), 16, 32.0, kernel="fused", norm_gradient="full", **options)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def test_a_small_layer_whose_norm_is_differentiated_keeps_its_input_alone(device):
    layer = small_layer().to(device)
    x = torch.randn(200, 64, device=device, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = layer(x)
    assert {t.data_ptr() for t in saved} == {x.data_ptr()}
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    found = torch.autograd.grad(y.square().sum(), leaves)
    layer.kernel = "plain"
    for one, other in zip(found, torch.autograd.grad(layer(x).square().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_which_layers_take_their_gradients_from_the_weights(device, monkeypatch):
    x = torch.randn(8, 64, device=device)
    layer = small_layer().to(device)

    def dense(*layers: DoRALinear, x: torch.Tensor = x) -> bool:
        return forms.is_dense(x, [each.projection() for each in layers])

    detached = DoRALinear(nn.Linear(64, 96), 16, 32.0, kernel="fused").to(device)
    assert dense(layer) and not dense(detached) and not dense(layer, detached)
    assert not dense(layer, x=x.half())
    taken: list[bool] = []
    original = fused.dense_gradients
    monkeypatch.setattr(fused, "dense_gradients", lambda *given: (taken.append(True), original(*given))[1])
    small_layer(dropout=0.5).to(device)(x).sum().backward()
    assert not taken
    layer(x).sum().backward()
    assert taken == [True]
    assert choose_dense(14000, 768, 768, 128, has_bias=True) and not choose_dense(14000, 4096, 4096, 128, has_bias=True)


@pytest.mark.parametrize("max_masked_rank", [0, 64])  # drop(x) is formed, and is not
def test_dropout_drops_the_input_of_the_low_rank_path(max_masked_rank, device, monkeypatch):
    monkeypatch.setattr(low_rank, "MAX_MASKED_RANK", max_masked_rank)
    features, p = 64, 0.25
    layer = LoRALinear(nn.Linear(features, features, bias=False), features, 1.0 * features, dropout=p, kernel="fused")
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(features))
        layer.lora_B.copy_(torch.eye(features))
    layer.to(device)
    x = (torch.rand(300, features, device=device) + 0.5).requires_grad_()
    torch.manual_seed(4)
    y = layer(x)
    mask = (y / x).detach()
    kept = mask > 0.5
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)), rtol=1e-3, atol=0)
    assert abs(kept.float().mean().item() - (1 - p)) < 0.01
    assert (kept.float().mean(0) - (1 - p)).abs().max() < 0.15 and (kept.float().mean(1) - (1 - p)).abs().max() < 0.25
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy * mask, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(layer.lora_A.grad, dy.t() @ (x.detach() * mask), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(layer.lora_B.grad, dy.t() @ (x.detach() * mask), rtol=2e-3, atol=1e-3)
    torch.manual_seed(4)
    assert torch.equal(layer(x), y)
    assert not torch.equal(layer(x), y)
    assert torch.equal(layer.eval()(x), layer(x))


def test_elements_are_dropped_independently(device):
    p, seed = 0.3, torch.tensor([5], device=device)
    kept = token_ops.masked(torch.ones(1024, 1024, device=device), None, seed, p) - (1 - p)
    variance = p * (1 - p)

    def deviation(*shifts: tuple[int, int]) -> float:
        """How many standard deviations the mean product of so shifted masks is off zero."""
        product = torch.ones(900, 900, device=device)
        for rows, columns in shifts:
            product = product * kept[rows : rows + 900, columns : columns + 900]
        return (product.mean() * 900 / variance ** (len(shifts) / 2)).abs().item()

    for step in (1, 2, 3, 4, 8, 16, 17, 32, 64, 100):
        for shifts in ([(0, 0), (0, step)], [(0, 0), (step, 0)], [(0, 0), (step, step)]):
            assert deviation(*shifts) < 4.5, shifts
        assert deviation((0, 0), (0, step), (step, 0), (step, step)) < 4.5
    assert deviation((0, 0)) < 4.5 and deviation((0, 0), (0, 1), (0, 2)) < 4.5


@pytest.mark.parametrize("norm_gradient", ["detached", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_large_ranks_the_mask_is_the_same(norm_gradient, dtype, device, monkeypatch):
    torch.manual_seed(0)
    options = {"dropout": 0.3, "kernel": "fused", "norm_gradient": norm_gradient}
    block = nn.ModuleList([DoRALinear(nn.Linear(70, 40), 20, 8.0, **options) for _ in range(3)]).to(device, dtype)
    for layer in block:
        nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(70, 36, device=device, dtype=dtype).t().requires_grad_()  # of any strides
    leaves = [x, *(p for p in block.parameters() if p.requires_grad)]
    results, kept = [], []
    for max_masked_rank in (0, 64):
        monkeypatch.setattr(low_rank, "MAX_MASKED_RANK", max_masked_rank)
        torch.manual_seed(1)
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t), t)[1], lambda t: t):
            outputs = fused.fused_linears(x, [layer.projection() for layer in block], 0.3)
        kept.append(sum(t.shape[-1] == 70 for t in saved))
        loss = sum(y.float().square().sum() for y in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    assert kept == [1, 1]  # x, or drop(x) in its place
    for one, other in zip(*results, strict=True):
        difference = (one.double() - other.double()).norm() / other.double().norm()
        assert difference < (1e-5 if dtype == torch.float32 else 1e-2)


def test_dropout_with_a_magnitude_is_the_plain_ones_on_average(device):
    layer = DoRALinear(nn.Linear(16, 8, bias=True), 4, 8.0, dropout=0.2, kernel="fused")
    nn.init.normal_(layer.lora_B, std=0.3)
    layer.to(device)
    x = torch.randn(1, 16, device=device).expand(4000, 16)
    mean = layer(x).mean(0)
    torch.testing.assert_close(mean, layer.eval()(x[:1])[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fresh_layer_returns_the_base_layers_output_bit_for_bit(dtype, bias, device):
    base = nn.Linear(48, 40, bias=bias).to(device, dtype)
    x = torch.randn(7, 48, device=device, dtype=dtype)
    expected = base(x)
    layer = DoRALinear(base, 4, 8.0, kernel="fused")
    assert torch.equal(layer(x), expected)
    layer._known_touched = True  # as in a compiled graph, which does not look
    torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("norm_gradient", ["detached", "full"])  # composed, and dense
def test_compiling_breaks_no_graph(norm_gradient, device):
    for bias in (False, True):
        base = nn.Linear(24, 32, bias=bias)
        layer = DoRALinear(base, 16, 8.0, kernel="fused", norm_gradient=norm_gradient).to(device)
        nn.init.normal_(layer.lora_B, std=0.1)
        x = torch.randn(6, 24, device=device, requires_grad=True)
        leaves = [x, layer.lora_A, layer.lora_B, layer.magnitude]
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, expected)
        found = [torch.autograd.grad(y.square().sum(), leaves) for y in (compiled, expected)]
        torch.testing.assert_close(found[0], found[1])


def test_operators_are_registered_soundly(device):
    x, weight = torch.randn(6, 8, device=device), torch.randn(10, 8, device=device)
    a, b = torch.randn(3, 8, device=device), torch.randn(10, 3, device=device)
    m, n, seed = torch.rand(10, device=device), torch.rand(10, device=device), torch.tensor([5], device=device)
    hidden, y = x @ a.t(), x @ weight.t()
    namespace = torch.ops.dora_core
    for operator, arguments in (
        (namespace.row_norm, (weight, a, b, 0.5)),
        (namespace.effective_weight, (weight, a, b, m, n, 0.5, torch.float32)),
        (namespace.weight_gradients, (weight + 1, weight, a, b, m, n, 0.5, True, torch.float32)),
        (namespace.weight_gradients, (weight + 1, weight, a, b, None, None, 0.5, False, torch.float32)),
        (namespace.compose, (y, hidden, b, m, n, None, 0.5)),
        (namespace.output_gradients, (y, y, hidden, b, m, n, None, 0.5, True, True)),
        (namespace.output_gradients, (y, None, hidden, b, None, None, None, 0.5, False, False)),
        (namespace.dropped_product, (x, a, seed, 0.1)),
        (namespace.dropped_gradient, (x, hidden, seed, 0.1)),
        (namespace.masked, (x, None, seed, 0.1)),
        (namespace.masked, (x, x + 1, seed, 0.1)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
    assert weight_ops.row_norm and token_ops.compose and gradient_ops.output_gradients  # registered by these modules


def test_few_tokens_are_composed_and_many_merged():
    for rule in (choose_form, choose_backward_form):
        for in_features, out_features in ((4096, 4096), (4096, 11008), (11008, 4096), (768, 768)):
            for rank in (1, 32, 384):
                forms: list[Form] = [rule(2**n, in_features, out_features, rank) for n in range(22)]
                assert forms[0] == "composed" and forms[-1] == "merged"
                assert sorted(forms) == forms  # one turn


def config(**settings) -> AdapterConfig:
    return AdapterConfig(rank=2, alpha=4, targets=["0"], **settings)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8)).to(dtype)


def test_the_report_says_which_kernels_and_why():
    assert apply_adapters(model(), config(kernel="plain")).kernels == "plain, as adapter.kernel says"
    said = apply_adapters(model(), config(kernel="fused")).kernels
    assert said.startswith("fused, on ")
    assert "kernels: fused, on " in str(apply_adapters(model(), config(kernel="fused")))
    said = apply_adapters(model(torch.float64), config()).kernels
    assert said == "plain, not the fused ones: they compute in bf16, fp16 and fp32, not in float64"
    if not torch.cuda.is_available():
        assert (
            apply_adapters(model(), config()).kernels == "plain, not the fused ones: they run on CUDA, not on the cpu"
        )


def test_fused_where_it_cannot_run_is_an_error_that_says_why(monkeypatch):
    with pytest.raises(ValueError, match=r"kernel is 'fused'.*not in float64.*kernel: auto"):
        apply_adapters(model(torch.float64), config(kernel="fused"))
    with pytest.raises(ValueError, match="dropout_mode update"):
        apply_adapters(model(), config(kernel="fused", dropout=0.1, dropout_mode="update"))
    layer = DoRALinear(nn.Linear(8, 8), 2, 4.0, kernel="fused")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._why_not_fused.cache_clear()
    try:
        with pytest.raises(ValueError, match="they run on CUDA, not on the cpu"):
            layer(torch.randn(2, 8))
        assert not DoRALinear(nn.Linear(8, 8), 2, 4.0)._is_fused(torch.randn(2, 8))
    finally:
        dispatch._why_not_fused.cache_clear()


@pytest.mark.parametrize(
    ("capability", "shared_kib", "reason"),
    [
        ((9, 0), 227, None),
        ((8, 0), 163, None),
        ((8, 9), 99, "they need 163 KiB of shared memory and A card has 99"),
        ((7, 5), 64, "they need compute capability 8.0 and A card has 7.5"),
    ],
)
def test_a_gpu_that_is_too_small_is_named(monkeypatch, capability, shared_kib, reason):
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    assert dispatch._why_not_on_gpu() == reason
