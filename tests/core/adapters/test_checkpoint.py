"""Saving and loading: exactly PEFT's files, nothing lost, nothing put in that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dora_core.adapters import (
    AdapterConfig,
    AdapterError,
    apply_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
)

CONFIG = AdapterConfig(
    rank=4,
    alpha=6,
    dropout=0.1,
    norm_gradient="full",
    targets=["q_proj", "up_proj"],
    magnitude_targets=["o_proj"],
    trainable=["model.norm"],
    rank_pattern={"layers.1.self_attn.q_proj": 2, r".*_proj": 3},
    alpha_pattern={"up_proj": 5.0},
)


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).logits


@pytest.fixture
def trained(llama, train):
    """A maker of a trained model for a configuration."""

    def make(config: AdapterConfig, **options: object) -> nn.Module:
        model = llama(**options)
        apply_adapters(model, config)
        train(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and name.endswith("weight"):
                    parameter.mul_(1.2)
        return model

    return make


def test_the_files_are_exactly_pefts(trained, tmp_path) -> None:
    model = trained(CONFIG)
    assert save_adapter(model, CONFIG, tmp_path / "new" / "folder", "base/model") == tmp_path / "new" / "folder"
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(folder / "adapter_model.safetensors")
    expected = {"base_model.model.model.norm.weight": (32,)}
    for layer, rank in ((0, 3), (1, 2)):
        path = f"base_model.model.model.layers.{layer}"
        for name, module_rank, inner, out in (
            ("self_attn.q_proj", rank, 32, 32),
            ("self_attn.o_proj", 1, 32, 32),
            ("mlp.up_proj", 3, 32, 48),
        ):
            expected[f"{path}.{name}.lora_A.weight"] = (module_rank, inner)
            expected[f"{path}.{name}.lora_B.weight"] = (out, module_rank)
            expected[f"{path}.{name}.lora_magnitude_vector"] = (out,)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "base/model",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "up_proj", "o_proj"],
        "exclude_modules": None,
        "rank_pattern": {
            r"model\.layers\.0\.self_attn\.o_proj": 1,
            r"model\.layers\.1\.self_attn\.o_proj": 1,
            "layers.1.self_attn.q_proj": 2,
            ".*_proj": 3,
        },
        "alpha_pattern": {"up_proj": 5.0},
        "use_rslora": False,
        "use_dora": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": ["model.norm"],
    }


CONFIGS = {
    "everything": CONFIG,
    "dora": AdapterConfig(rank=4, targets=["q_proj"]),
    "lora": AdapterConfig(kind="lora", rank=4, rslora=True, targets=r".*\.[qv]_proj"),
    "magnitude alone": AdapterConfig(targets=[], magnitude_targets=".*_proj"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_adapter_loads_into_the_base_and_into_an_adapted_model(
    llama, trained, tokens, tmp_path, name: str
) -> None:
    config = CONFIGS[name]
    model = trained(config)
    save_adapter(model, config, tmp_path)
    want = logits(model, tokens)
    fresh = llama()
    loaded, report = load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, tokens), want)
    assert report.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (loaded.dropout, loaded.norm_gradient, loaded.dropout_mode) == (
        config.dropout,
        config.norm_gradient,
        config.dropout_mode,
    )
    again = llama()
    apply_adapters(again, config)
    assert load_adapter(again, tmp_path)[1] is None
    assert torch.equal(logits(again, tokens), want)
    save_adapter(fresh, loaded, tmp_path / "second")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "second"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert load_adapter(llama(), tmp_path / "second")[0] == loaded


def test_a_trained_tied_weight_is_saved_under_each_of_its_names(llama, trained, tokens, tmp_path) -> None:
    config = AdapterConfig(rank=2, targets=["q_proj"], trainable=["lm_head"])
    model = trained(config, tie_embeddings=True)
    save_adapter(model, config, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == [
        "lm_head",
        "model.embed_tokens",
    ]
    fresh = llama(tie_embeddings=True)
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, tokens), logits(model, tokens))


def test_the_running_statistics_of_a_trained_module_are_saved(tmp_path) -> None:
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    config = AdapterConfig(rank=2, targets=["0"], trainable=["1"])
    model = make()
    apply_adapters(model, config)
    model(torch.arange(12.0).reshape(3, 4))
    save_adapter(model, config, tmp_path)
    fresh = make()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.eval()(torch.ones(2, 4)), model.eval()(torch.ones(2, 4)))


def test_a_bf16_model_saves_fp32_and_keeps_its_extras_exact(llama, tokens, tmp_path, train) -> None:
    config = AdapterConfig(rank=2, targets=["q_proj"], trainable=["lm_head"])
    model = llama().bfloat16()
    apply_adapters(model, config)
    train(model)
    save_adapter(model, config, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    fresh = llama().bfloat16()
    load_adapter(fresh, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(fresh, tokens), logits(model, tokens))


def refusal(model: nn.Module, folder: Path) -> str:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, folder)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name in after)
    assert str(folder) in str(caught.value) or "merged" in str(caught.value)
    return str(caught.value)


def test_an_adapter_of_another_base_model_is_refused(llama, trained, tmp_path) -> None:
    config = AdapterConfig(rank=2, targets=["q_proj", "up_proj"])
    save_adapter(trained(config), config, tmp_path)
    text = refusal(llama(hidden=64), tmp_path)
    assert "q_proj.lora_A has shape (2, 32); this model needs (2, 64)" in text and "another base model or rank" in text
    text = refusal(llama(layers=3), tmp_path)
    assert "missing 2: model.layers.2.mlp.up_proj, model.layers.2.self_attn.q_proj" in text
    text = refusal(llama(layers=1), tmp_path)
    assert "surplus 2: model.layers.1.mlp.up_proj" in text and "base model it was trained on" in text


@pytest.mark.parametrize(
    ("own", "needed"),
    [
        ({"rank": 3}, "shape"),
        ({"alpha": 8}, "scales model.layers.0.self_attn.q_proj by 2.5; this model's layer by 4"),
        ({"rslora": True}, "alpha and rslora"),
        ({"kind": "lora"}, "surplus 1: magnitude"),
        ({"targets": ["q_proj", "v_proj"]}, "missing 2"),
        ({"targets": ["v_proj"]}, "surplus 2"),
        ({"trainable": ["lm_head"]}, "modules_to_save do not fit the model (missing 1: lm_head.weight"),
    ],
)
def test_an_adapter_that_is_not_this_models_is_refused(llama, trained, tmp_path, own: dict, needed: str) -> None:
    saved = {"rank": 2, "alpha": 5, "targets": ["q_proj"]}
    save_adapter(trained(AdapterConfig(**saved)), AdapterConfig(**saved), tmp_path)
    model = llama()
    apply_adapters(model, AdapterConfig(**saved | own))
    assert needed in refusal(model, tmp_path)


def test_loading_into_a_merged_model_is_refused(trained, tmp_path) -> None:
    config = AdapterConfig(rank=2, targets=["q_proj"])
    model = trained(config)
    save_adapter(model, config, tmp_path)
    merge_adapters(model)
    assert "unmerge_adapters" in refusal(model, tmp_path)
