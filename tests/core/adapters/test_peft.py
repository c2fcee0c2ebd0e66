"""PEFT both ways: what is written here computes the same there, what PEFT writes computes the same here."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from dora_core.adapters import AdapterConfig, AdapterError, DoRALinear, apply_adapters, load_adapter, save_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]
TARGETS = ["q_proj", "up_proj"]


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).logits


OURS = {
    "dora": {},
    "lora": {"kind": "lora"},
    "dora rslora": {"rslora": True},
    "lora rslora": {"kind": "lora", "rslora": True},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"layers\.\d\.mlp\.up_proj": 3},
        "alpha_pattern": {"q_proj": 3.0},
    },
    "regular expression": {"targets": r".*\.1\.(self_attn\.[qk]|mlp\.down)_proj"},
    "magnitude": {"magnitude_targets": ["o_proj", "down_proj"]},
    "magnitude under a wide rank pattern": {"magnitude_targets": ["o_proj"], "rank_pattern": {".*_proj": 3}},
    "magnitude by regular expression": {"targets": r".*q_proj", "magnitude_targets": r".*\.0\..*o_proj"},
    "magnitude alone": {"targets": [], "magnitude_targets": ["o_proj", "down_proj"]},
    "extras": {"trainable": ["lm_head", "model.norm", "layers.0.mlp.gate_proj"]},
    "extras around targets": {"trainable": ["layers.0.mlp"]},
}


@pytest.mark.parametrize("name", OURS)
def test_an_adapter_written_here_computes_the_same_in_peft(llama, train, tokens, tmp_path, name: str) -> None:
    config = AdapterConfig(**{"rank": 4, "alpha": 6, "targets": TARGETS} | OURS[name])
    model = llama()
    apply_adapters(model, config)
    train(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and key.endswith("weight"):
                parameter.mul_(1.3)
    save_adapter(model, config, tmp_path, "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*|.*unexpected.*")
        other = PeftModel.from_pretrained(llama(), tmp_path).eval()
    difference = (logits(other, tokens) - logits(model, tokens)).abs().max()
    assert float(difference) < 1e-6
    assert float((logits(llama(), tokens) - logits(model, tokens)).abs().max()) > 1e-2


PEFTS = {
    "dora": {"use_dora": True},
    "lora": {},
    "dora rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {
        "use_dora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "no_such_layer": 9},
        "alpha_pattern": {"q_proj": 3, "neither": 1},
    },
    "regular expression": {"use_dora": True, "target_modules": r".*\.1\..*[qk]_proj"},
    "all linear": {"use_dora": True, "target_modules": "all-linear"},
    "some layers": {"use_dora": True, "layers_to_transform": [1], "rank_pattern": {"up_proj": 2}},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["model.layers.0.self_attn.v_proj"]},
    "saved modules": {"use_dora": True, "modules_to_save": ["lm_head", "gate_proj"]},
    "a saved container": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "the output layer": {"use_dora": True, "target_modules": ["q_proj", "lm_head"]},
    "gaussian start": {"use_dora": True, "init_lora_weights": "gaussian"},
}


def peft_model(base: nn.Module, options: dict) -> nn.Module:
    torch.manual_seed(4)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "lora_B" in name:
                parameter.normal_(std=0.2)
            elif "lora_A" not in name:
                parameter.mul_(1.3)
    return model


@pytest.mark.parametrize("name", PEFTS)
def test_an_adapter_written_by_peft_computes_the_same_here(llama, tokens, tmp_path, name: str) -> None:
    other = peft_model(llama(), PEFTS[name])
    other.save_pretrained(tmp_path)
    model = llama()
    config, report = load_adapter(model, tmp_path)
    assert float((logits(other, tokens) - logits(model, tokens)).abs().max()) < 1e-6
    assert float((logits(llama(), tokens) - logits(model, tokens)).abs().max()) > 1e-3
    assert report.num_trainable == sum(p.numel() for p in other.parameters() if p.requires_grad)
    assert config.dropout_mode == ("update" if PEFTS[name].get("use_dora") else "lowrank")


def test_a_base_weight_in_the_file_that_is_not_the_models_is_refused(llama, tmp_path) -> None:
    peft_model(llama(), {"target_modules": ["lm_head"]}).save_pretrained(tmp_path)
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(AdapterError, match=r"a weight of lm_head that is not this model's"):
        load_adapter(model, tmp_path)


def test_the_keys_and_the_configuration_are_those_that_peft_writes(llama, tmp_path) -> None:
    options = {"use_dora": True, "modules_to_save": ["lm_head"]}
    peft_model(llama(), options).save_pretrained(tmp_path / "peft")
    model = llama()
    config = AdapterConfig(rank=4, alpha=6, targets=TARGETS, trainable=["lm_head"])
    apply_adapters(model, config)
    save_adapter(model, config, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert {key: tensor.shape for key, tensor in theirs.items()} == {key: tensor.shape for key, tensor in ours.items()}
    raw = {name: json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "ours")}
    known = set(LoraConfig().to_dict())
    assert set(raw["ours"]) <= known
    for key, value in raw["ours"].items():
        same = sorted(raw["peft"][key]) if key == "target_modules" else raw["peft"][key]
        assert same == (sorted(value) if key == "target_modules" else value) or key == "base_model_name_or_path", key
    assert peft.__version__.startswith("0.21")


def test_an_adapter_goes_here_to_peft_and_back_unchanged(llama, train, tokens, tmp_path) -> None:
    config = AdapterConfig(rank=4, alpha=6, targets=TARGETS, magnitude_targets=["o_proj"])
    model = llama()
    apply_adapters(model, config)
    train(model)
    save_adapter(model, config, tmp_path / "ours")
    PeftModel.from_pretrained(llama(), tmp_path / "ours").save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    back = llama()
    load_adapter(back, tmp_path / "peft")
    torch.testing.assert_close(logits(back, tokens), logits(model, tokens), rtol=0, atol=1e-6)


def test_dropout_in_the_update_is_pefts_dropout(llama, tmp_path) -> None:
    other = peft_model(llama(), {"use_dora": True, "lora_dropout": 0.5, "target_modules": ["q_proj"]})
    other.save_pretrained(tmp_path)
    model = llama()
    load_adapter(model, tmp_path)
    theirs = other.base_model.model.model.layers[0].self_attn.q_proj
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, DoRALinear) and layer.dropout == 0.5
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    ours = layer.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, theirs.train()(x), rtol=1e-5, atol=1e-5)
