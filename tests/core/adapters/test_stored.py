"""Files that are broken, contradict themselves, or need what the layers lack; and the reference's own format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_core.adapters import AdapterConfig, AdapterError, apply_adapters, load_adapter, save_adapter

Q = "base_model.model.model.layers.{}.self_attn.q_proj"


@pytest.fixture
def folder(llama, train, tmp_path) -> Path:
    config = AdapterConfig(rank=2, alpha=4, targets=["q_proj"])
    model = llama()
    apply_adapters(model, config)
    return save_adapter(train(model), config, tmp_path)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def refusal(model: nn.Module, folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, folder)
    text = str(caught.value)
    assert str(folder) in text and text.endswith(".")
    return text


def test_missing_magnitudes_are_an_error(llama, folder) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(Q.format(1) + ".lora_magnitude_vector"))
    text = refusal(llama(), folder)
    assert "asks for DoRA, but 1 modules have no magnitude (first model.layers.1.self_attn.q_proj)" in text


def test_surplus_magnitudes_are_an_error(llama, folder) -> None:
    edit_config(folder, use_dora=False)
    assert "use_dora false, but the file holds 2 magnitudes" in refusal(llama(), folder)


def test_a_missing_factor_is_an_error(llama, folder) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(Q.format(1) + ".lora_B.weight"))
    assert "tensors of model.layers.1.self_attn.q_proj do not fit the model (missing 1: lora_B)" in refusal(
        llama(), folder
    )


def test_a_module_without_factors_is_no_module_of_magnitude_alone_unless_the_file_says_so(llama, folder) -> None:
    def remove(tensors: dict[str, Tensor]) -> None:
        del tensors[Q.format(1) + ".lora_A.weight"], tensors[Q.format(1) + ".lora_B.weight"]

    edit_tensors(folder, remove)
    assert "missing 2: lora_A, lora_B" in refusal(llama(), folder)


def test_a_missing_layer_is_an_error(llama, folder) -> None:
    def remove(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(Q.format(1))]:
            del tensors[key]

    edit_tensors(folder, remove)
    assert "missing 1: model.layers.1.self_attn.q_proj" in refusal(llama(), folder)


def test_a_tensor_of_a_wrong_shape_is_an_error(llama, folder) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({Q.format(0) + ".lora_magnitude_vector": torch.ones(31)}))
    assert "q_proj.magnitude has shape (31,); this model needs (32,)" in refusal(llama(), folder)


def test_a_surplus_tensor_is_an_error(llama, folder) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({Q.format(0) + ".lora_C.weight": torch.ones(3)}))
    assert "lora_C.weight' belongs to no adapter" in refusal(llama(), folder)


def test_a_tensor_without_pefts_prefix_is_an_error(llama, folder) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.x.lora_A.weight": torch.ones(3)}))
    assert "'model.x.lora_A.weight' does not start with 'base_model.model.'" in refusal(llama(), folder)


def test_an_adapted_embedding_is_an_error(llama, folder) -> None:
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(3)}))
    assert "adapts an embedding" in refusal(llama(), folder)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_truncated_file_is_an_error(llama, folder, size: int) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "cannot be read" in refusal(llama(), folder)


def test_missing_files_are_an_error(llama, folder) -> None:
    (folder / "adapter_model.safetensors").unlink()
    assert "holds neither adapter_model.safetensors nor adapter_model.bin" in refusal(llama(), folder)
    (folder / "adapter_config.json").unlink()
    assert "holds no adapter_config.json" in refusal(llama(), folder)


@pytest.mark.parametrize(("text", "needed"), [("{", "not valid JSON"), ("[]", "list"), ("{}", "peft_type is None")])
def test_a_broken_configuration_is_an_error(llama, folder, text: str, needed: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    assert needed in refusal(llama(), folder)


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["experts.weight"]},
        {"alora_invocation_tokens": [1]},
        {"use_qalora": True},
        {"arrow_config": {"top_k": 2}},
        {"use_bdlora": {"nblocks": 2}},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"r": 0},
        {"r": None},
        {"lora_alpha": "much"},
        {"rank_pattern": [1]},
    ],
)
def test_an_option_that_cannot_be_followed_is_an_error_that_names_it(llama, folder, change: dict) -> None:
    edit_config(folder, **change)
    text = refusal(llama(), folder)
    name = next(iter(change))
    broken_value = name in ("r", "lora_alpha", "rank_pattern")
    assert ("adapter_config.json cannot be used" if broken_value else name) in text


REFERENCE = {
    "peft_type": "DORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "yahma/llama-7b-hf",
    "inference_mode": True,
    "r": 3,
    "lora_alpha": 6,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "up_proj"],
    "Wdecompose_target_modules": ["o_proj"],
    "dora_simple": False,
    "merge_weights": False,
    "fan_in_fan_out": False,
    "enable_lora": None,
    "bias": "none",
    "modules_to_save": None,
}


def write_reference(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Write an adapter in the reference's format and return the effective weights that its formula gives."""
    generator = torch.Generator().manual_seed(3)
    stored, weights = {}, {}
    for name, module in model.named_modules():
        if not name.endswith(("q_proj", "up_proj", "o_proj")):
            continue
        direction = module.weight.detach().double()
        out, inner = direction.shape
        prefix = f"base_model.model.{name}"
        if not name.endswith("o_proj"):
            lora_A, lora_B = torch.randn(3, inner, generator=generator), torch.randn(out, 3, generator=generator) * 0.02
            stored |= {f"{prefix}.lora_A.weight": lora_A, f"{prefix}.lora_B.weight": lora_B}
            direction = direction + 6 / 3 * lora_B.double() @ lora_A.double()
        magnitude = torch.rand(out, 1, generator=generator) * 0.2 + 0.05
        stored[f"{prefix}.weight_m_wdecomp.weight"] = magnitude
        weights[f"{name}.weight"] = (magnitude * direction / direction.norm(dim=1, keepdim=True)).float()
    torch.save(stored, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(REFERENCE))
    return weights


def test_the_references_own_format_gives_its_formulas_logits(llama, tokens, tmp_path) -> None:
    plain, model = llama(), llama()
    weights = write_reference(plain, tmp_path)
    plain.load_state_dict(weights, strict=False)
    config, report = load_adapter(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=0, atol=2e-6)
    assert report.num_magnitude == 2 * (32 + 48 + 32)
    assert (config.kind, config.rank, config.alpha, config.dropout) == ("dora", 3, 6, 0.05)
    assert (config.dropout_mode, config.norm_gradient) == ("update", "full")
    save_adapter(model, config, tmp_path / "peft")
    again = llama()
    load_adapter(again, tmp_path / "peft")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_truncated_reference_file_is_an_error(llama, tmp_path) -> None:
    write_reference(llama(), tmp_path)
    path = tmp_path / "adapter_model.bin"
    for size in (0, 7, path.stat().st_size // 2):
        path.write_bytes(path.read_bytes()[:size])
        assert "cannot be read" in refusal(llama(), tmp_path)
        write_reference(llama(), tmp_path)
