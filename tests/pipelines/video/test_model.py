from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BartConfig, BartForConditionalGeneration

from dora_core.adapters import apply_adapters, load_adapter, save_adapter
from dora_core.cli import main as dora
from dora_core.config import load_config
from pipelines.video.config import RECIPES, ModelSection, VideoAdapterSection, VideoConfig
from pipelines.video.encode import EXTRA_TOKENS
from pipelines.video.merge import probe
from pipelines.video.model import load_tokenizer, load_vl_bart
from pipelines.video.vl_bart import VLBart

DIM = 12


@pytest.fixture(scope="module")
def model(dataset) -> VLBart:
    return load(dataset)


def load(dataset, **options) -> VLBart:
    section = ModelSection(path=str(dataset / "model"))
    return load_vl_bart(section, load_tokenizer(section), DIM, "fp32", **options).eval()


@torch.no_grad()
def logits(model, **changes) -> torch.Tensor:
    return model(**(probe(model) | changes)).logits


def test_without_features_it_is_transformers_own_bart(dataset, model):
    plain = BartForConditionalGeneration.from_pretrained(dataset / "model").eval()
    ids = torch.tensor([[1, 40, 50, 60, 2, 3], [1, 70, 2, 3, 3, 3]])
    mask = (ids != 3).long()
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
        found = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
    assert torch.equal(found[..., : expected.shape[-1]], expected)


def test_visual_tokens_are_the_sum_of_feature_box_picture_and_place(model):
    embedding = model.model.encoder.visual_embedding
    features = torch.randn(2, 6, DIM)
    words = model.get_input_embeddings().weight
    first = model.config.first_place_id
    found = embedding(features, words[first : first + 3], 2)
    assert found.shape == (2, 6, 32)
    linear, norm = embedding.feature
    box = embedding.position[1](embedding.position[0].bias)
    for token in range(6):
        expected = norm(linear(features[:, token])) + box + embedding.picture.weight[token // 3]
        assert torch.allclose(found[:, token], expected + words[first + token % 3], atol=1e-5)
    assert (
        load_tokenizer(ModelSection(path=model.config._name_or_path)).convert_ids_to_tokens(first) == EXTRA_TOKENS[100]
    )


def test_what_is_masked_is_not_seen_and_reference_padding_is(model):
    features = torch.randn(1, 4, DIM)
    padded = torch.cat([features, torch.zeros(1, 3, DIM)], 1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    alone = logits(model, features=features)
    assert torch.allclose(logits(model, features=padded, feature_mask=mask), alone, atol=1e-5)
    assert not torch.allclose(logits(model, features=padded), alone, atol=1e-3)
    other = torch.cat([features, torch.randn(1, 3, DIM)], 1)
    assert torch.allclose(logits(model, features=other, feature_mask=mask), alone, atol=1e-5)


def test_two_pictures_and_the_order_of_frames_are_told_apart(model):
    features = torch.randn(1, 6, DIM)
    found = [
        logits(model, features=features, num_pictures=1),
        logits(model, features=features, num_pictures=2),
        logits(model, features=features.flip(1), num_pictures=1),
        logits(model, features=features.roll(3, 1), num_pictures=2),
    ]
    assert all(not torch.allclose(found[0], other, atol=1e-3) for other in found[1:])
    assert not torch.allclose(found[1], found[3], atol=1e-3)


def test_generating_encodes_once_and_answers_as_the_logits_say(model):
    ids = torch.tensor([[1, 40, 50, 2], [1, 60, 2, 3]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 3).long(), "features": torch.randn(2, 5, DIM)}
    calls = []
    handle = model.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    found = model.generate(**inputs, num_beams=1, do_sample=False, max_new_tokens=5)
    handle.remove()
    assert len(calls) == 1
    written = torch.full((2, 1), 2)
    with torch.no_grad():
        for _ in range(found.shape[1] - 1):
            best = model(**inputs, decoder_input_ids=written).logits[:, -1].argmax(-1, keepdim=True)
            written = torch.cat([written, best], 1)
    alive = (found[:, 1:] == 2).cumsum(1) == 0
    assert torch.equal(found[:, 1:][alive], written[:, 1:][alive]) and alive.any()


def test_weights_that_no_file_has_are_the_same_in_every_run(dataset, model):
    torch.manual_seed(123)
    again = load(dataset)
    torch.rand(1)
    for (name, own), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(own, other), name


def trained(dataset, config: VideoAdapterSection) -> VLBart:
    model = load(dataset)
    apply_adapters(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    for module in model.modules():
        if hasattr(module, "invalidate"):
            module.invalidate()
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_an_adapter_comes_back_peft_loads_it_and_merged_it_computes_the_same(dataset, tmp_path, kind, precision):
    norms = ["visual_embedding", "self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"]
    config = VideoAdapterSection(kind=kind, rank=4, alpha=4, trainable=norms)
    model = trained(dataset, config)
    save_adapter(model, config, tmp_path / "adapter", str(dataset / "model"))
    load_tokenizer(ModelSection(path=str(dataset / "model"))).save_pretrained(tmp_path / "adapter")
    fresh = load(dataset)
    load_adapter(fresh, tmp_path / "adapter")
    expected = logits(model)
    assert torch.equal(logits(fresh), expected) and not torch.allclose(expected, logits(load(dataset)), atol=0.1)
    there = PeftModel.from_pretrained(load(dataset), tmp_path / "adapter").eval()
    assert torch.allclose(logits(there), expected, atol=1e-4)
    output = tmp_path / "merged"
    dora(["merge", "video", "--adapter", str(tmp_path / "adapter"), "--output", str(output), "--precision", precision])
    section = ModelSection(path=str(output))
    merged = load_vl_bart(section, load_tokenizer(section), DIM, "fp32").eval()
    bound = 1e-4 if precision == "fp32" else 0.1 * expected.abs().max()
    assert (logits(merged) - expected).abs().max() < bound
    assert load_file(output / "model.safetensors")["model.encoder.visual_embedding.feature.0.weight"].shape == (32, DIM)


def test_features_of_another_size_and_models_that_are_no_bart_are_refused(dataset, tmp_path):
    load(dataset).save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path), tokenizer=str(dataset / "model"))
    with pytest.raises(
        ValueError, match=r"The size of features is 13; it must be that which .* was trained with \(12\)"
    ):
        load_vl_bart(section, load_tokenizer(section), 13, "fp32")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="a BART; this one is a 'llama'"):
        load_vl_bart(section, load_tokenizer(section), DIM, "fp32")


@pytest.mark.parametrize(
    ("recipe", "dim", "share"),
    [
        ("vlbart_image_dora_r128", 2048, 5.96),
        ("vlbart_image_lora_r128", 2048, 5.93),
        ("vlbart_video_dora_r128", 512, 5.19),
        ("vlbart_video_lora_r128", 512, 5.17),
        ("vlbart_video_full", 512, 100),
    ],
)
def test_the_recipes_train_the_papers_shares_of_parameters(recipe, dim, share):
    """Tables 2 and 3, to the digits that they print."""
    config = load_config(VideoConfig, recipe, [], recipes=RECIPES)
    with torch.device("meta"):
        model = VLBart(BartConfig(vocab_size=50465, **BART_BASE, visual_dim=dim, first_place_id=50365))
        report = apply_adapters(model, config.adapter)
    assert round(100 * report.share, 2) == share
    if config.adapter.kind == "dora":
        assert report.num_low_rank == 36 * 128 * 1536 and report.num_magnitude == 36 * 768


BART_BASE = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "max_position_embeddings": 1024,
}
