"""Merging: small stated differences, an exact way back, and a plain model at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from dora_core.adapters import (
    AdapterConfig,
    adapters_disabled,
    apply_adapters,
    merge_adapters,
    merge_and_unload,
    unmerge_adapters,
)

CONFIGS = {
    "dora": AdapterConfig(rank=4, alpha=8, targets=["q_proj", "up_proj"], magnitude_targets=["o_proj"]),
    "lora": AdapterConfig(kind="lora", rank=4, alpha=8, targets=["q_proj", "up_proj"]),
}
# The largest |logit| is about 1. In bf16 the merged weight is rounded, 2^-9 of each element.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_merging_changes_little_says_how_much_and_unmerging_is_exact(
    llama, train, tokens, kind: str, dtype: torch.dtype
) -> None:
    model = llama().to(dtype)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_adapters(model, CONFIGS[kind])
    train(model)
    with torch.no_grad():
        before = model(tokens).logits
        report = merge_adapters(model)
        after = model(tokens).logits
    assert 0 < report.max_logit_difference < BOUNDS[dtype] and report.num_layers == (6 if kind == "dora" else 4)
    assert float((before.double() - after.double()).abs().max()) < BOUNDS[dtype]
    assert report.max_logit == pytest.approx(0.9, abs=0.5)
    assert f"{report.max_logit_difference:.3g} of logits up to {report.max_logit:.3g}" in str(report)
    assert merge_adapters(model).max_logit_difference == 0  # merging twice changes nothing
    assert unmerge_adapters(model).max_logit_difference == report.max_logit_difference
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.items())
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    assert unmerge_adapters(model).max_logit_difference == 0


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_unloaded_model_is_a_plain_one_for_transformers(llama, train, tokens, tmp_path, kind: str) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    apply_adapters(model, CONFIGS[kind])
    train(model)
    with torch.no_grad():
        before = model(tokens).logits
        report = merge_and_unload(model)
        after = model(tokens).logits
    assert 0 < report.max_logit_difference < 1e-6
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert not [module for module in model.modules() if type(module).__module__.startswith("dora_core")]
    model.save_pretrained(tmp_path / "merged")
    keys = [set(load_file(tmp_path / name / "model.safetensors")) for name in ("base", "merged")]
    assert keys[0] == keys[1]
    for file in (tmp_path / "merged").glob("*.json"):
        assert "dora" not in file.read_text() and "lora" not in file.read_text()
    assert _files(tmp_path / "base") == _files(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, after)


def _files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_unloading_a_merged_model_changes_nothing_more(llama, train, tokens) -> None:
    model = llama()
    apply_adapters(model, CONFIGS["dora"])
    train(model)
    merge_adapters(model)
    with torch.no_grad():
        merged = model(tokens).logits
        assert merge_and_unload(model).max_logit_difference == 0
        assert torch.equal(model(tokens).logits, merged)


def test_a_fresh_adapter_merges_to_the_base_weights_exactly(llama) -> None:
    model = llama().bfloat16()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_adapters(model, CONFIGS["dora"])
    assert merge_and_unload(model).max_logit_difference == 0
    assert model.state_dict().keys() == plain.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.items())


def test_the_disabled_model_is_the_base_model(llama, train, tokens) -> None:
    model = llama()
    with torch.no_grad():
        base = model(tokens).logits
        apply_adapters(model, CONFIGS["dora"])
        train(model)
        with adapters_disabled(model):
            assert torch.equal(model(tokens).logits, base)
        assert not torch.allclose(model(tokens).logits, base)
        merge_adapters(model)
    with pytest.raises(ValueError, match="merged"), adapters_disabled(model):
        pass


def test_a_model_without_a_vocabulary_takes_a_probe_and_keeps_each_modules_mode(train) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    apply_adapters(model, AdapterConfig(rank=2, targets=["0", "2"], dropout=0.3))
    train(model)
    model.train()
    model[2].eval()
    assert merge_adapters(model).max_logit_difference is None
    assert "not measured" in str(unmerge_adapters(model))
    report = merge_adapters(model, {"input": torch.ones(2, 4)})
    assert report.max_logit_difference < 1e-5
    assert [module.training for module in model] == [True, True, False]


def test_a_model_without_adapters_cannot_be_merged(llama) -> None:
    for function in (merge_adapters, unmerge_adapters, merge_and_unload):
        with pytest.raises(ValueError, match=r"no adapted layers.*apply_adapters or load_adapter"):
            function(llama())
