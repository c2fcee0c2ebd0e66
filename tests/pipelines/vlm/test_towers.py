"""Towers of open_clip: the small models among its names, with random weights."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration

from dora_core.adapters import apply_adapters
from dora_core.config import ConfigError
from dora_core.registry import RegistryError
from pipelines.vlm.config import ModelSection, VLMAdapterSection
from pipelines.vlm.export import what_is_trained
from pipelines.vlm.model import load_llava, load_tokenizer
from pipelines.vlm.towers import OpenClipTower, load_open_clip_tower


def section(llava_folder, tmp_path, tower: str) -> ModelSection:
    whole = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    LlamaForCausalLM(whole.config.text_config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llava_folder).save_pretrained(tmp_path)
    return ModelSection(language_model=str(tmp_path), vision_tower=tower)


@pytest.mark.parametrize("name", ["ViT-S-32-alt", "ViT-S-32-alt-quickgelu"])
def test_a_clip_transformer_of_open_clip_becomes_transformers_own_with_its_features(name, tmp_path, monkeypatch):
    if name.endswith("quickgelu"):
        config = {**open_clip.get_model_config("ViT-S-32-alt"), "quick_gelu": True}
        (tmp_path / "conf").mkdir()
        (tmp_path / "conf" / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / "conf")
    model = open_clip.create_model(name)
    with torch.no_grad():  # what starts at 0 or 1 would hide a mix-up
        for parameter in model.visual.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    tower, vision = load_open_clip_tower(f"open_clip:{name}:{tmp_path / 'weights.pt'}", -2)
    assert type(tower) is CLIPVisionModel
    assert (vision.size, vision.num_tokens, vision.resample) == (224, 49, "bicubic")
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model.visual.eval().forward_intermediates(
            pixels, indices=[-2], intermediates_only=True, output_fmt="NLC"
        )["image_intermediates"][0]
        found = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.allclose(found, expected, atol=2e-5, rtol=1e-4)
    assert found.std() > 0.1


def test_any_other_model_of_open_clip_is_wrapped_and_gives_its_own_layer(tmp_path, llava_folder):
    given = section(llava_folder, tmp_path, "open_clip:RN50")
    model, vision = load_llava(given, load_tokenizer(given), "fp32")
    tower = model.model.vision_tower
    assert type(tower) is OpenClipTower and not tower.visual.training
    assert (vision.size, vision.num_tokens) == (224, 14 * 14)
    pixels = torch.randn(1, 3, 224, 224)
    ids = torch.tensor([[1, *[model.config.image_token_id] * 196, 5, 6]])
    with torch.no_grad():
        features = model.model.get_image_features(
            pixel_values=pixels, vision_feature_layer=-2, vision_feature_select_strategy="full", return_dict=True
        ).pooler_output[0]
        visual = tower.visual
        expected = visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))).flatten(2).transpose(1, 2)
        expected = model.model.multi_modal_projector(expected)[0]
        assert torch.allclose(features, expected, atol=1e-4)
        assert model(input_ids=ids, pixel_values=pixels).logits.isfinite().all()
    apply_adapters(model, VLMAdapterSection(rank=2, alpha=4))
    assert what_is_trained(model) == "adapter"


def test_full_fine_tuning_with_a_tower_that_cannot_be_saved_is_refused_before_it_begins(tmp_path, llava_folder):
    given = section(llava_folder, tmp_path, "open_clip:RN50")
    model, _ = load_llava(given, load_tokenizer(given), "fp32")
    apply_adapters(model, VLMAdapterSection(kind="full", targets=".*", trainable=["multi_modal_projector"]))
    with pytest.raises(ConfigError, match="ModifiedResNet, which transformers has no class for"):
        what_is_trained(model)


def test_unknown_names_and_tags_are_errors_with_the_known_ones():
    with pytest.raises(RegistryError, match=r"Unknown open_clip model 'ViT-L-14-337'.*Did you mean.*ViT-L-14-336"):
        load_open_clip_tower("open_clip:ViT-L-14-337", -2)
    with pytest.raises(ConfigError, match=r"Pretrained tags of ViT-B-32:.*openai"):
        load_open_clip_tower("open_clip:ViT-B-32:no_such_tag", -2)


def test_weights_of_openai_come_with_their_activation(monkeypatch):
    """open_clip gives ``ViT-B-32`` with the tag ``openai`` another one, and only warns."""
    made = {}
    create = open_clip.create_model

    def without_weights(name, *, pretrained, require_pretrained, **options):
        made[pretrained] = options
        return create("ViT-S-32-alt", **options)

    monkeypatch.setattr(open_clip, "create_model", without_weights)
    for tag, act in (("openai", "quick_gelu"), ("laion2b_s34b_b79k", "gelu")):
        tower, _ = load_open_clip_tower(f"open_clip:ViT-B-32:{tag}", -2)
        assert tower.config.hidden_act == act and made[tag] == {"force_quick_gelu": tag == "openai"}
