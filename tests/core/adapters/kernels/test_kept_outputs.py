"""Activation checkpointing that keeps the outputs of chosen layers."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_core.adapters import (
    AdapterConfig,
    AdapterError,
    DoRALinear,
    LoRALinear,
    apply_adapters,
    checkpoint_activations,
    reuse_norms,
)
from dora_core.adapters.kernels import forms, fused, keep_outputs, kept_outputs
from dora_core.testing.tiny import tiny_llama


class Block(nn.Module):
    """x + down(tanh(up(x)))."""

    def __init__(self, kind: type[LoRALinear] = DoRALinear, bias: bool = False, **options):
        super().__init__()
        self.up_proj, self.down_proj = (
            kind(nn.Linear(*sizes, bias=bias), 4, 8.0, kernel="fused", **options) for sizes in ((16, 24), (24, 16))
        )
        for layer in self.children():
            nn.init.normal_(layer.lora_B, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


def build(device: str, **options) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([Block(**options) for _ in range(2)]).to(device)


def run(blocks: nn.ModuleList, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output and all gradients, with the same dropout whenever it is called."""
    torch.manual_seed(1)
    y = x
    for block in blocks:
        y = checkpoint(block, y, use_reentrant=False, context_fn=keep_outputs)
    return y, list(torch.autograd.grad(y.square().sum(), [x, *(p for p in blocks.parameters() if p.requires_grad)]))


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The number of outputs of each layer that is computed."""
    seen: list[int] = []
    original = fused._forward

    def spy(x, source, stack, *others):
        seen.append(stack.projections[0].weight.shape[0])
        return original(x, source, stack, *others)

    monkeypatch.setattr(fused, "_forward", spy)
    return seen


def x_for(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()


@pytest.mark.parametrize("form", ["merged", "composed"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": LoRALinear},
        {"bias": True},
        {"dropout": 0.3},
        {"norm_gradient": "full"},
        {"bias": True, "dropout": 0.3, "norm_gradient": "full"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["keep", "offload"])
def test_gradients_are_those_of_computing_again_bit_for_bit(form, options, dtype, way, device, computed, monkeypatch):
    monkeypatch.setattr(forms, "choose_form", lambda *_: form)
    blocks, x = build(device, **options).to(dtype), x_for(device, dtype)
    with reuse_norms(blocks):
        expected = run(blocks, x)
        assert computed == [24, 16, 24, 16, 24, 16, 24, 16]
        computed.clear()
        for block in blocks:
            block.down_proj.recomputation = way
            block.down_proj.invalidate()
        found = run(blocks, x)
    assert computed == [24, 16, 24, 16, 24, 24]
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        assert torch.equal(one, other)


def test_outputs_live_until_their_block_is_done(device):
    blocks, x = build(device), x_for(device)
    kept: list[weakref.ref] = []
    alive_at_backward: list[list[bool]] = []
    for block in blocks:
        block.down_proj.recomputation = "keep"
        block.down_proj.register_forward_hook(lambda _, __, y: kept.append(weakref.ref(y.untyped_storage())))
    y = x
    for block in blocks:
        y = checkpoint(block, y, use_reentrant=False, context_fn=keep_outputs)
        y.register_hook(lambda _: alive_at_backward.append([ref() is not None for ref in kept[:2]]))
    y.sum().backward()
    assert alive_at_backward == [[True, True], [True, False]]
    assert not any(ref() is not None for ref in kept)


@pytest.mark.parametrize("way", ["keep", "offload"])
def test_an_output_that_the_model_writes_to_is_computed_again(way, device, computed):
    class Writing(Block):
        def forward(self, x):
            return self.down_proj(torch.tanh(self.up_proj(x))).add_(x)

    torch.manual_seed(0)
    blocks, x = nn.ModuleList([Writing(kind=LoRALinear)]).to(device), x_for(device)
    expected = run(blocks, x)[1]
    blocks[0].down_proj.recomputation = way
    computed.clear()
    for one, other in zip(run(blocks, x)[1], expected, strict=True):
        assert torch.equal(one, other)
    assert computed == [24, 16, 24, 16]


@pytest.mark.parametrize("way", ["keep", "offload"])
def test_a_graph_that_is_used_twice_and_blocks_within_blocks(way, device, computed):
    blocks, x = build(device), x_for(device)

    def both(x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False, context_fn=keep_outputs)
        return x

    expected = run(blocks, x)[1]
    for block in blocks:
        block.down_proj.recomputation = way
    computed.clear()
    leaves = [x, *(p for p in blocks.parameters() if p.requires_grad)]
    loss = checkpoint(both, x, use_reentrant=False, context_fn=keep_outputs).square().sum()
    for retain in (True, False):
        for one, other in zip(torch.autograd.grad(loss, leaves, retain_graph=retain), expected, strict=True):
            torch.testing.assert_close(one, other)
    again = [24, 16, 24, 24]  # a block's first pass within the recomputation of both is a first pass
    assert computed == [24, 16, 24, 16, *again, *again]


def test_a_pass_that_cannot_begin_leaves_nothing_behind(device, monkeypatch):
    blocks, x = build(device), x_for(device)
    blocks[1].down_proj.recomputation = "keep"

    def fail(self) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(kept_outputs._Kept, "fetch", fail)
        with pytest.raises(MemoryError):
            run(blocks, x)
    assert kept_outputs._Pass.current() is None


def test_siblings_that_are_recomputed_otherwise_are_computed_apart(device, computed):
    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj"):
                self.add_module(name, DoRALinear(nn.Linear(16, 16, bias=False), 4, 8.0, kernel="fused"))

        def forward(self, x: Tensor) -> Tensor:
            return x + sum(layer(x) for layer in self.children())

    blocks, x = nn.ModuleList([Siblings()]).to(device), x_for(device)
    blocks[0].q_proj.recomputation = "keep"
    calls = []
    with reuse_norms(blocks) as reuse:
        for _ in range(3):
            computed.clear()
            run(blocks, x)
            reuse.parameters_changed()
            calls.append(len(computed))
    assert calls == [5, 3, 3]  # k and v together from the second step on, and q once


def adapted_llama(device: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_llama(vocab_size=64).to(device).train()
    config = AdapterConfig(rank=4, kernel="fused", **options)
    apply_adapters(model, config)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B, std=0.1)
            layer.invalidate()
    checkpoint_activations(model, config)
    return model


def test_a_transformers_model_multiplies_once_by_what_its_recipe_keeps(device, computed):
    ids = torch.arange(12, device=device)[None]
    gradients, calls = [], []
    for kept in ([], ["down_proj"]):
        model = adapted_llama(device, kept_outputs=kept)
        computed.clear()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        calls.append(len(computed))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert calls[0] - calls[1] == model.config.num_hidden_layers
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])


def test_adapted_layers_keep_what_their_recipe_names_and_the_report_says_how_many():
    with pytest.raises(AdapterError, match=r"adapter\.kept_outputs: Unknown pattern 'down'.*down_proj"):
        apply_adapters(tiny_llama(vocab_size=64), AdapterConfig(rank=4, kept_outputs=["down"]))

    def kept(**options) -> tuple[list[str], str]:
        model = tiny_llama(vocab_size=64, layers=2)
        report = apply_adapters(
            model, AdapterConfig(rank=4, **({"kernel": "fused", "kept_outputs": ["down_proj", "o_proj"]} | options))
        )
        ways = {name: layer.recomputation for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
        return [f"{name}: {way}" for name, way in ways.items() if way != "compute"], str(report)

    layers, report = kept()
    assert layers == [f"model.layers.{i}.mlp.down_proj: keep" for i in range(2)]
    assert "the outputs of 2 layers are kept on the GPU" in report
    layers, report = kept(
        targets=["q_proj"], magnitude_targets="model.layers.1.*(o|down)_proj", offload_kept_outputs=True
    )
    assert layers == [f"model.layers.1.{name}: offload" for name in ("self_attn.o_proj", "mlp.down_proj")]
    assert "the outputs of 2 layers are kept in the host's memory" in report
    layers, report = kept(targets=["q_proj", "v_proj"])
    assert not layers and "the outputs of 0 layers" in report
    assert kept(kernel="plain")[1].endswith("plain, as adapter.kernel says; so adapter.kept_outputs has no effect")


def test_checkpointing_that_keeps_nothing_can_be_compiled(device):
    ids = torch.arange(12, device=device)[None]
    gradients = []
    for compiled in (False, True):
        model = adapted_llama(device)
        called = torch.compile(model, backend="aot_eager") if compiled else model
        called(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].mlp.down_proj.magnitude.grad)
    torch.testing.assert_close(*gradients)
