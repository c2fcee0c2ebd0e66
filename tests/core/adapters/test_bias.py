"""Trained biases: which ones train, and that files hold them, PEFT's and ours."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from dora_core.adapters import (
    AdapterConfig,
    AdapterError,
    apply_adapters,
    load_adapter,
    merge_and_unload,
    save_adapter,
)

TOKENS = torch.tensor([[0, 5, 9, 11, 2], [0, 7, 3, 2, 1]])


def bart() -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        init_std=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BartForConditionalGeneration(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits


def moved(model: nn.Module) -> nn.Module:
    """Change whatever trains, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    for module in model.modules():
        if hasattr(module, "invalidate"):
            module.invalidate()
    return model


def trained_biases(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if name.endswith("bias") and p.requires_grad}


def config_with(bias: str, **others) -> AdapterConfig:
    return AdapterConfig(**{"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"], "bias": bias} | others)


def test_all_biases_those_of_adapted_layers_or_none_are_trained() -> None:
    found = {}
    for bias in ("none", "lora_only", "all"):
        model = bart()
        apply_adapters(model, config_with(bias))
        found[bias] = trained_biases(model)
    every = {name for name, _ in bart().named_parameters() if name.endswith("bias")}
    assert found["none"] == set()
    assert found["lora_only"] == {name for name in every if "q_proj" in name or "v_proj" in name}
    assert found["all"] == every


def test_biases_of_excluded_modules_stay_frozen_and_no_biases_at_all_is_an_error() -> None:
    model = bart()
    apply_adapters(model, config_with("all", exclude=r".*decoder.*"))
    assert trained_biases(model) and not any("decoder" in name for name in trained_biases(model))
    with pytest.raises(AdapterError, match="there are no such biases"):
        apply_adapters(nn.Sequential(nn.Linear(4, 4, bias=False)), config_with("all", targets=["0"]))


def test_an_adapter_with_excluded_biases_comes_back(tmp_path) -> None:
    config = config_with("all", exclude=r".*decoder.*")
    model = bart()
    apply_adapters(model, config)
    save_adapter(moved(model), config, tmp_path, "base")
    fresh = bart()
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_trained_biases_are_fp32_in_a_half_model() -> None:
    model = bart().bfloat16()
    apply_adapters(model, config_with("all"))
    assert {p.dtype for name, p in model.named_parameters() if name.endswith("bias")} == {torch.float32}


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("trainable", [[], r".*(final_layer_norm|layers\.0\.fc1)"])
def test_what_is_saved_comes_back_to_the_bit_and_computes_the_same_in_peft(tmp_path, bias: str, trainable) -> None:
    config = config_with(bias, trainable=trainable)
    model = bart()
    apply_adapters(model, config)
    before = logits(model)
    save_adapter(moved(model), config, tmp_path, "base")
    assert (logits(model) - before).abs().max() > 0.05
    fresh = bart()
    loaded, _ = load_adapter(fresh, tmp_path)
    assert loaded.bias == bias
    assert torch.equal(logits(fresh), logits(model))
    there = PeftModel.from_pretrained(bart(), tmp_path).eval()
    assert torch.allclose(logits(there), logits(model), atol=1e-5)
    merged = bart()
    load_adapter(merged, tmp_path)
    merge_and_unload(merged)
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_what_peft_saves_with_biases_computes_the_same_here(tmp_path, bias: str, use_dora: bool) -> None:
    torch.manual_seed(0)
    theirs = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], bias=bias, use_dora=use_dora)
    model = moved(get_peft_model(bart(), theirs).eval())
    model.save_pretrained(tmp_path)
    fresh = bart()
    load_adapter(fresh, tmp_path)
    assert torch.allclose(logits(fresh), logits(model), atol=1e-5)


def test_a_missing_bias_is_refused_before_anything_is_copied(tmp_path) -> None:
    config = config_with("all")
    model = bart()
    apply_adapters(model, config)
    model.model.encoder.layers[0].fc1.bias.requires_grad_(False)
    save_adapter(model, config, tmp_path)
    with pytest.raises(AdapterError, match=r"the biases do not fit .*missing 1: model.encoder.layers.0.fc1"):
        load_adapter(bart(), tmp_path)
