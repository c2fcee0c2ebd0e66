"""The norm is computed once per optimizer step, and never used when it is stale."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_core.adapters import AdapterConfig, DoRALinear, apply_adapters, load_adapter, reuse_norms, save_adapter


class Block(nn.Module):
    """Two layers whose activations are recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: x + self.down(self.up(x).tanh()), x, use_reentrant=False)


CONFIG = AdapterConfig(rank=3, alpha=6, targets=["up", "down"])


def make_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block())
    apply_adapters(model, CONFIG)
    return model


def layers_of(model: nn.Module) -> list[DoRALinear]:
    return [module for module in model.modules() if isinstance(module, DoRALinear)]


def batch(index: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(index))


OPTIMIZERS: dict[str, Callable] = {
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=1e-2, fused=True),
}


def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    for step in range(num_steps):
        for micro in range(4):
            model(batch(4 * step + micro)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    return OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])


def test_the_norm_is_computed_once_per_step_over_micro_batches_and_recomputation() -> None:
    model = make_model()
    with reuse_norms(model):
        accumulate(model, optimizer_of(model, "adamw fused"), 3)
    assert [layer.num_norms_computed for layer in layers_of(model)] == [3] * 4


def test_without_the_block_every_call_computes_the_norm() -> None:
    model = make_model()
    accumulate(model, optimizer_of(model, "adamw fused"), 3)
    assert [layer.num_norms_computed for layer in layers_of(model)] == [3 * 4 * 2] * 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_accumulated_steps_are_bit_equal_with_and_without_reuse(name: str) -> None:
    plain, reused = make_model(), make_model()
    accumulate(plain, optimizer_of(plain, name), 20)
    with reuse_norms(reused):
        accumulate(reused, optimizer_of(reused, name), 20)
    for (key, a), b in zip(plain.state_dict().items(), reused.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert layers_of(plain)[0].lora_B.any()


def edit(layer: DoRALinear, name: str) -> None:
    with torch.no_grad():
        getattr(layer, name).mul_(1.5)


def load_state(layer: DoRALinear, **options: bool) -> None:
    layer.load_state_dict({key: 1.5 * value for key, value in layer.state_dict().items()}, **options)


def change_scale(layer: DoRALinear) -> None:
    layer.scale *= 2


def replace_b(layer: DoRALinear) -> None:
    new = nn.Parameter(1.5 * layer.lora_B.detach())
    while new._version < layer.lora_B._version:  # so that versions alone would not tell them apart
        new.add_(0)
    layer.lora_B = new


CHANGES: dict[str, Callable[[DoRALinear], object]] = {
    "load_state_dict": load_state,
    "load_state_dict by assignment": lambda layer: load_state(layer, assign=True),
    "merge": lambda layer: (layer.merge_(), edit(layer, "lora_B"), layer.unmerge_()),
    "an edit of the weight": lambda layer: edit(layer, "weight"),
    "an edit of A": lambda layer: edit(layer, "lora_A"),
    "an edit of B": lambda layer: edit(layer, "lora_B"),
    "a replaced B": replace_b,
    "a changed scale": change_scale,
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_parameters_is_noticed(train, name: str) -> None:
    model = train(nn.Sequential(DoRALinear(nn.Linear(6, 9), 3, 6)))
    layer = model[0]
    with torch.no_grad(), reuse_norms(model):
        stale = layer(batch(0))
        assert torch.equal(layer(batch(0)), stale) and layer.num_norms_computed == 1
        CHANGES[name](layer)
        x = batch(0).to(layer.weight.dtype)
        fresh = layer(x)
        assert layer.num_norms_computed >= 2
    with torch.no_grad():
        assert torch.equal(fresh, layer(x))
    assert not torch.equal(fresh, stale)


def test_loading_an_adapter_is_noticed(train, tmp_path) -> None:
    model, other = make_model(), train(make_model(), 7)
    save_adapter(other, CONFIG, tmp_path)
    with torch.no_grad(), reuse_norms(model):
        model(batch(0))
        load_adapter(model, tmp_path)
        assert torch.equal(model(batch(0)), other(batch(0)))


def test_a_write_through_data_counts_when_it_is_announced(train) -> None:
    model = train(nn.Sequential(DoRALinear(nn.Linear(6, 9), 3, 6)))
    with torch.no_grad(), reuse_norms(model) as handle:
        model(batch(0))
        model[0].lora_B.data.mul_(3)
        handle.parameters_changed()
        fresh = model(batch(0))
    assert torch.equal(fresh, model(batch(0)).detach())


def test_a_merged_layer_needs_no_norm_and_unmerging_restores_the_output(train) -> None:
    model = train(nn.Sequential(DoRALinear(nn.Linear(6, 9), 3, 6)))
    with torch.no_grad(), reuse_norms(model):
        before = model(batch(0))
        model[0].merge_()
        num_computed = model[0].num_norms_computed
        torch.testing.assert_close(model(batch(0)), before)
        assert model[0].num_norms_computed == num_computed
        model[0].unmerge_()
        assert torch.equal(model(batch(0)), before)


def test_blocks_nest_and_the_outer_one_survives_the_inner(train) -> None:
    model = train(nn.Sequential(DoRALinear(nn.Linear(6, 9), 3, 6)))
    layer = model[0]
    with torch.no_grad(), reuse_norms(model) as outer:
        model(batch(0))
        with reuse_norms(model):
            model(batch(0))
            assert layer.num_norms_computed == 1
            layer.lora_B.data.mul_(3)
            outer.parameters_changed()
            model(batch(0))
            assert layer.num_norms_computed == 2
        model(batch(0))
        model(batch(0))
        assert layer.num_norms_computed == 3
    for _ in range(2):
        layer.lora_B.data.mul_(3)
        model(batch(0))
    assert layer.num_norms_computed == 5


def test_after_the_block_an_unannounced_write_counts_even_after_an_error(train) -> None:
    model = train(nn.Sequential(DoRALinear(nn.Linear(6, 9), 3, 6)))
    with pytest.raises(RuntimeError, match="stop"), reuse_norms(model):
        stale = model(batch(0))
        raise RuntimeError("stop")
    model[0].lora_B.data.mul_(3)
    assert not torch.equal(model(batch(0)), stale)


def test_a_copy_made_within_the_block_does_not_reuse(train) -> None:
    model = train(nn.Sequential(DoRALinear(nn.Linear(6, 9), 3, 6)))
    with torch.no_grad(), reuse_norms(model) as handle:
        model(batch(0))
        twin = copy.deepcopy(model)
        twin(batch(0))
        twin[0].lora_B.data.mul_(3)
        model[0].lora_B.data.mul_(3)
        handle.parameters_changed()
        assert torch.equal(twin(batch(0)), model(batch(0)))


def test_a_norm_left_by_inference_mode_serves_the_next_training_step() -> None:
    model = make_model()
    with reuse_norms(model):
        with torch.inference_mode():
            model(batch(0))
        model(batch(1)).sum().backward()
    assert [layer.num_norms_computed for layer in layers_of(model)] == [1] * 4
