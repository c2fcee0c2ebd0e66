"""What a run leaves behind gives the logits that it had: adapters with their projector, merged and whole models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from dora_core.adapters import apply_adapters, save_adapter
from dora_core.adapters.inject import AdapterError
from dora_core.adapters.linear import LoRALinear
from dora_core.cli import main as dora
from dora_core.config import ConfigError
from pipelines.vlm.config import ModelSection, VLMAdapterSection
from pipelines.vlm.merge import load_any_adapter, merge, probe
from pipelines.vlm.model import load_llava, load_tokenizer
from pipelines.vlm.towers import facts_of


def load(folder: Path):
    section = ModelSection(path=str(folder))
    return load_llava(section, load_tokenizer(section), "fp32")


@torch.no_grad()
def logits(model, vision) -> torch.Tensor:
    return model.eval()(**probe(model, vision)).logits


@pytest.fixture(scope="module", params=["dora", "lora"])
def trained(request, llava_folder, tmp_path_factory):
    """An adapted model with every trained tensor changed, what it was saved to, and its logits."""
    model, vision = load(llava_folder)
    config = VLMAdapterSection(kind=request.param, rank=4, alpha=8)
    apply_adapters(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + 0.3 * noise) if "magnitude" in name else parameter.add_(0.2 * noise)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, config, folder, str(llava_folder))
    return model, vision, folder


def test_a_reloaded_adapter_has_identical_logits_magnitudes_and_projector_included(trained, llava_folder):
    model, vision, folder = trained
    fresh, _ = load(llava_folder)
    before = logits(fresh, vision)
    load_any_adapter(fresh, folder)
    assert torch.equal(logits(fresh, vision), logits(model, vision))
    assert not torch.allclose(logits(fresh, vision), before, atol=0.1)
    for (name, own), (_, loaded) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(own, loaded), name


def test_an_adapter_with_a_projector_is_merged_in_half_precision(trained, llava_folder, tmp_path):
    model, vision, folder = trained
    dora(["merge", "vlm", "--adapter", str(folder), "--output", str(tmp_path), "--precision", "bf16"])
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    difference = (logits(merged, vision) - logits(model, vision)).abs().max()
    assert difference < 0.05 * logits(model, vision).abs().max()


def test_the_magnitudes_and_the_projector_in_the_file_matter(trained, llava_folder, tmp_path):
    model, vision, folder = trained
    state = load_file(folder / "adapter_model.safetensors")
    kinds = {"magnitude_vector": 14} if any("magnitude" in name for name in state) else {}
    for part, count in {**kinds, "multi_modal_projector": 4}.items():
        lost = {name: tensor for name, tensor in state.items() if part not in name}
        assert len(state) - len(lost) == count
        save_file(lost, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
        fresh, _ = load(llava_folder)
        if part == "magnitude_vector":
            with pytest.raises(AdapterError, match="14 modules have no magnitude"):
                load_any_adapter(fresh, tmp_path)
        else:
            load_any_adapter(fresh, tmp_path)
            assert not torch.allclose(logits(fresh, vision), logits(model, vision), atol=1e-3)


def test_peft_loads_adapter_and_projector_to_the_same_logits(trained, llava_folder):
    model, vision, folder = trained
    base = LlavaForConditionalGeneration.from_pretrained(llava_folder, dtype=torch.float32)
    with torch.no_grad():
        given = PeftModel.from_pretrained(base, folder).eval()(**probe(model, vision)).logits
    assert torch.allclose(given, logits(model, vision), atol=1e-5)


def test_merging_makes_a_plain_llava_that_transformers_loads_with_its_processor(
    trained, llava_folder, tmp_path, capsys
):
    model, vision, folder = trained
    dora(["merge", "vlm", "--adapter", str(folder), "--output", str(tmp_path), "--precision", "fp32"])
    assert "merged 14 layers, maximum logit difference" in capsys.readouterr().out
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(merged) is LlavaForConditionalGeneration
    assert not any(isinstance(module, LoRALinear) for module in merged.modules())
    assert torch.allclose(logits(merged, vision), logits(model, vision), atol=1e-4)
    assert facts_of(merged.config.vision_config, str(tmp_path)) == vision
    processor = AutoProcessor.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.endswith("USER: <image>\nwhat? ASSISTANT:")
    inputs = processor(images=torch.zeros(3, 20, 30, dtype=torch.uint8), text=text, return_tensors="pt")
    assert (inputs["input_ids"] == merged.config.image_token_id).sum() == vision.num_tokens
    assert merged(**inputs).logits.isfinite().all()


def test_an_adapter_that_names_no_base_asks_for_one(trained, tmp_path):
    _, _, folder = trained
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="Pass --base MODEL, or --config RECIPE"):
        merge(tmp_path, tmp_path / "out")


def as_original(state: dict[str, torch.Tensor], magnitude: str) -> tuple[dict, dict]:
    """Return an adapter's tensors as LLaVA's scripts write them: (adapter_model.bin, non_lora_trainables.bin)."""
    factors, others = {}, {}
    for name, tensor in state.items():
        name = name.replace("model.language_model.", "model.")
        if name.endswith(".lora_magnitude_vector"):
            others[name.replace(".lora_magnitude_vector", magnitude)] = tensor[:, None]
        elif "projector" in name:
            place = "0" if "linear_1" in name else "2"
            others[f"base_model.model.model.mm_projector.{place}.{name.rpartition('.')[2]}"] = tensor
        else:
            factors[name] = tensor
    return factors, others


@pytest.mark.parametrize("magnitude", [".weight_m_wdecomp.weight", ".weight_m_wdecomp.default.weight"])
def test_a_run_of_the_original_repository_is_read_with_the_magnitudes_its_own_script_loses(
    trained, llava_folder, tmp_path, magnitude
):
    model, vision, folder = trained
    factors, others = as_original(load_file(folder / "adapter_model.safetensors"), magnitude)
    is_dora = any("wdecomp" in name for name in others)
    torch.save(factors, tmp_path / "adapter_model.bin")
    torch.save(others, tmp_path / "non_lora_trainables.bin")
    config = {"peft_type": "DORA" if is_dora else "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    fresh, _ = load(llava_folder)
    load_any_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, vision), logits(model, vision))
    merge(tmp_path, tmp_path / "merged", ModelSection(path=str(llava_folder)), "fp32")
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged, vision), logits(model, vision), atol=1e-4)
    if is_dora:
        torch.save({n: t for n, t in others.items() if "wdecomp" not in n}, tmp_path / "non_lora_trainables.bin")
        with pytest.raises(ConfigError, match="14 modules have no magnitude"):
            load_any_adapter(load(llava_folder)[0], tmp_path)
