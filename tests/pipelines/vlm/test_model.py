from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from dora_core.adapters import apply_adapters
from dora_core.adapters.linear import LoRALinear
from dora_core.config import ConfigError
from pipelines.vlm.config import ModelSection, VLMAdapterSection, VLMTrainSection
from pipelines.vlm.model import instruction_loss, load_llava, load_tokenizer, param_groups
from pipelines.vlm.original import read_projector, write_projector

NAMES = {"multi_modal_projector.linear_1": "mm_projector.0", "multi_modal_projector.linear_2": "mm_projector.2"}


@pytest.fixture(scope="module")
def whole(llava_folder) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(llava_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory, llava_folder, whole) -> Path:
    """The same weights as a language model, a vision tower and a projector."""
    folder = tmp_path_factory.mktemp("parts")
    language_model = LlamaForCausalLM(whole.config.text_config)
    language_model.model.load_state_dict(whole.model.language_model.state_dict())
    language_model.lm_head.load_state_dict(whole.lm_head.state_dict())
    language_model.save_pretrained(folder / "language_model")
    AutoTokenizer.from_pretrained(llava_folder).save_pretrained(folder / "language_model")
    tower = CLIPVisionModel(whole.config.vision_config)
    tower.load_state_dict(whole.model.vision_tower.state_dict())
    tower.save_pretrained(folder / "tower")
    shutil.copy(llava_folder / "preprocessor_config.json", folder / "tower")
    write_projector(whole.model.multi_modal_projector, folder)
    return folder


def load(section: ModelSection, precision: str = "fp32", **options: Any):
    tokenizer = load_tokenizer(section)
    return *load_llava(section, tokenizer, precision, **options), tokenizer


def assembled(parts: Path, **changes: Any) -> ModelSection:
    given = {
        "language_model": str(parts / "language_model"),
        "vision_tower": str(parts / "tower"),
        "projector": str(parts / "mm_projector.bin"),
    }
    return ModelSection(**{**given, **changes})


def inputs(model, num_images: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 100, (max(1, num_images), 30), generator=generator)
    if num_images:
        ids[:, 2:18] = model.config.image_token_id
    return {"input_ids": ids, "pixel_values": torch.randn(max(1, num_images), 3, 16, 16, generator=generator)}


@torch.no_grad()
def logits(model, **options: Any) -> torch.Tensor:
    return model.eval()(**inputs(model), **options).logits


def test_a_whole_llava_has_the_logits_of_transformers_and_its_own_pixels(llava_folder, whole):
    model, vision, _ = load(ModelSection(path=str(llava_folder)))
    assert torch.equal(logits(model), logits(whole))
    assert (vision.size, vision.num_tokens, vision.mean) == (16, 16, (0.5, 0.4, 0.3))


def test_a_llava_assembled_from_its_parts_has_the_same_logits(parts, whole):
    model, vision, _ = load(assembled(parts))
    assert type(model) is LlavaForConditionalGeneration
    assert torch.equal(logits(model), logits(whole))
    assert (vision.size, vision.num_tokens, vision.mean) == (16, 16, (0.5, 0.4, 0.3))
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in whole.named_parameters()}


def test_the_recipes_attention_reaches_every_part_of_an_assembled_model(parts):
    model, _, _ = load(assembled(parts, attention="eager"))
    layers = [model.model.language_model.layers[0].self_attn, model.model.vision_tower.encoder.layers[0].self_attn]
    assert [layer.config._attn_implementation for layer in layers] == ["eager", "eager"]


def test_a_tower_of_another_kind_or_a_layer_that_it_lacks_is_refused(parts, llava_folder):
    with pytest.raises(ConfigError, match=r"is a 'llama' model; it must be a CLIP vision model"):
        load(assembled(parts, vision_tower=str(parts / "language_model")))
    with pytest.raises(ValueError, match=r"model\.feature_layer is -9; it must be at least -4"):
        load(assembled(parts, feature_layer=-9))
    with pytest.raises(ConfigError, match="has a vision tower of its own"):
        load(ModelSection(path=str(llava_folder), vision_tower=str(parts / "tower")))


def test_a_language_model_without_an_image_token_is_given_one_that_is_never_the_likeliest(parts, tmp_path, whole):
    language_model = LlamaForCausalLM.from_pretrained(parts / "language_model")
    before = language_model.config.vocab_size - 1
    language_model.resize_token_embeddings(before)
    language_model.save_pretrained(tmp_path)
    tokenizer = json.loads((parts / "language_model" / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<image>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(tmp_path)
    model, _, tokenizer = load(assembled(parts, language_model=str(tmp_path)))
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == before
    assert model.config.text_config.vocab_size % 64 == 0
    for weight in (model.lm_head.weight, model.get_input_embeddings().weight):
        assert torch.allclose(weight[before:], weight[:before].mean(0).expand_as(weight[before:]), atol=1e-6)
    assert torch.allclose(logits(model)[..., :before], logits(whole)[..., :before], atol=1e-5)


def test_a_new_projector_depends_on_the_seed_alone(parts):
    first, second, other = (
        load(assembled(parts, projector=None), seed=seed)[0].model.multi_modal_projector for seed in (1, 1, 2)
    )
    assert torch.equal(first.linear_1.weight, second.linear_1.weight)
    assert not torch.equal(first.linear_1.weight, other.linear_1.weight)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("with_tower", [False, True])
def test_a_checkpoint_of_the_original_repository_is_read(tmp_path, parts, whole, llava_folder, suffix, with_tower):
    state = {}
    for name, tensor in whole.state_dict().items():
        for own, other in NAMES.items():
            name = name.replace(own, other)
        if "vision_tower" not in name:
            state[name.replace("model.language_model.", "model.")] = tensor.clone()
        elif with_tower:
            state[name.replace("vision_tower.", "vision_tower.vision_tower.vision_model.")] = tensor.clone()
    if suffix == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    tower = parts / "tower"
    if with_tower:  # what the checkpoint holds wins
        tower = tmp_path / "other_tower"
        CLIPVisionModel(whole.config.vision_config).save_pretrained(tower)
    config = {
        **whole.config.text_config.to_dict(),
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(tower),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_hidden_size": 24,
        "use_mm_proj": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    torch.save({"learning_rate": object()}, tmp_path / "training_args.bin")  # its trainer leaves such a file
    AutoTokenizer.from_pretrained(llava_folder).save_pretrained(tmp_path)
    model, _, _ = load(ModelSection(path=str(tmp_path)))
    assert torch.equal(logits(model), logits(whole))


def test_another_kind_of_original_checkpoint_is_refused(tmp_path, llava_folder):
    config = {"model_type": "llava_llama", "mm_vision_tower": "x", "mm_projector_type": "linear"}
    shutil.copytree(llava_folder, tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="mm_projector_type is 'linear'; only 'mlp2x_gelu'"):
        load_llava(ModelSection(path=str(tmp_path / "a")), AutoTokenizer.from_pretrained(llava_folder), "fp32")


def test_a_projector_goes_out_and_comes_back_under_llavas_names(tmp_path, whole):
    write_projector(whole.model.multi_modal_projector, tmp_path)
    assert sorted(torch.load(tmp_path / "mm_projector.bin")) == [
        f"model.mm_projector.{place}.{kind}" for place in (0, 2) for kind in ("bias", "weight")
    ]
    found = read_projector(str(tmp_path / "mm_projector.bin"))
    own = whole.model.multi_modal_projector.state_dict()
    assert found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [({"model.mm_projector.weight": torch.zeros(2)}, "it must hold"), (b"no weights", "cannot be read")],
)
def test_a_file_that_is_no_projector_is_refused(tmp_path, parts, tensors, message):
    file = tmp_path / "mm_projector.bin"
    file.write_bytes(tensors) if isinstance(tensors, bytes) else torch.save(tensors, file)
    with pytest.raises(ConfigError, match=message):
        load(assembled(parts, projector=str(file)))


def test_a_projector_of_another_model_is_refused(tmp_path, parts, whole):
    wide = torch.nn.Module()
    wide.linear_1, wide.linear_2 = torch.nn.Linear(24, 64), torch.nn.Linear(64, 64)
    write_projector(wide, tmp_path)
    with pytest.raises(ConfigError, match=r"has shape \(64, 24\).*Use the files of one model"):
        load(assembled(parts, projector=str(tmp_path / "mm_projector.bin")))


def test_what_is_no_llava_is_refused_with_the_way_out(parts, llava_folder):
    with pytest.raises(ConfigError, match=r"is a 'llama' model.*model\.language_model"):
        load(ModelSection(path=str(parts / "language_model")))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_llava(ModelSection(path="no/such"), AutoTokenizer.from_pretrained(llava_folder), "fp32")
    with pytest.raises(ConfigError, match="The vision tower"):
        load(assembled(parts, vision_tower="no/such/tower"))
    for bad in ({}, {"path": "a", "language_model": "b"}, {"language_model": "b"}):
        with pytest.raises(ValueError, match="either path, or language_model and vision_tower"):
            ModelSection(**bad)


def test_a_tokenizer_of_another_model_is_refused(llava_folder, parts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llava_folder)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    swapped = content.replace('"<image>"', '"<other>"').replace('"new"', '"<image>"')
    (tmp_path / "tokenizer.json").write_text(swapped)
    config = (tmp_path / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(
        config.replace('"<image>"', '"<other>"').replace('"new"', '"<image>"')
    )
    with pytest.raises(ConfigError, match=r"Set model\.tokenizer to the tokenizer that belongs"):
        load(ModelSection(path=str(llava_folder), tokenizer=str(tmp_path)))


def test_from_scratch_keeps_the_shape_and_nothing_else(llava_folder, whole):
    model, _, _ = load(ModelSection(path=str(llava_folder), from_scratch=True))
    assert [p.shape for p in model.parameters()] == [p.shape for p in whole.parameters()]
    assert not torch.equal(model.lm_head.weight.cpu(), whole.lm_head.weight)


def test_adapters_are_on_the_language_model_alone_unless_asked(llava_folder):
    model, _, _ = load(ModelSection(path=str(llava_folder)))
    report = apply_adapters(model, VLMAdapterSection(rank=4, alpha=8))
    adapted = {module.name for module in report.modules if module.kind == "dora"}
    linears = {
        name
        for name, module in model.model.language_model.named_modules(prefix="model.language_model")
        if isinstance(module, torch.nn.Linear | LoRALinear)
    }
    assert adapted == linears and len(adapted) == 14
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert {name for name in trained if "magnitude" not in name} == {
        f"model.multi_modal_projector.linear_{place}.{kind}" for place in (1, 2) for kind in ("weight", "bias")
    }
    asked, _, _ = load(ModelSection(path=str(llava_folder)))
    apply_adapters(asked, VLMAdapterSection(rank=4, alpha=8, exclude=[]))
    assert any(isinstance(module, LoRALinear) for module in asked.model.vision_tower.modules())


def test_the_projector_has_a_learning_rate_of_its_own(llava_folder):
    model, _, _ = load(ModelSection(path=str(llava_folder)))
    apply_adapters(model, VLMAdapterSection(rank=4, alpha=8))
    groups = {group["name"]: group for group in param_groups(model, VLMTrainSection(lr=2e-4, projector_lr=2e-5))}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "A": 2e-4,
        "B": 2e-4,
        "magnitude": 2e-4,
        "projector_other": 2e-5,
        "projector_other_1d": 2e-5,
    }
    assert sum(p.numel() for n in groups if "projector" in n for p in groups[n]["params"]) == sum(
        p.numel() for p in model.model.multi_modal_projector.parameters()
    )
    whole = param_groups(model, VLMTrainSection(lr=2e-4))
    assert {group["lr"] for group in whole} == {2e-4}


class Call:
    """Stands for an engine: calls the model."""

    def __init__(self, model) -> None:
        self.model = model

    def __call__(self, **inputs):
        return self.model(**inputs)


def test_the_loss_is_that_of_all_logits_under_a_mask_though_few_are_made_and_none_is_used(
    llava_folder, attention_masks
):
    model, _, _ = load(ModelSection(path=str(llava_folder)))
    batch = inputs(model)
    labels = torch.full((2, 30), -100)
    labels[0, 20:24], labels[1, 25:] = batch["input_ids"][0, 20:24], batch["input_ids"][1, 25:]
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, 26:] = 0  # padding on the right, as of a shorter row
    batch |= {"attention_mask": mask, "labels": labels}
    loss = instruction_loss(Call(model), batch)
    assert attention_masks and all(mask is None for mask in attention_masks)
    every = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    expected = F.cross_entropy(every.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    nothing = instruction_loss(Call(model), {**batch, "labels": torch.full((2, 30), -100)})
    nothing.backward()
    assert nothing.item() == 0


def test_a_batch_without_image_tokens_runs_the_tower_and_is_text_alone(llava_folder, whole):
    model, _, _ = load(ModelSection(path=str(llava_folder)))
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append("tower"))
    batch = inputs(model, num_images=0)
    given = model(**batch).logits
    with torch.no_grad():
        assert torch.equal(given, whole(input_ids=batch["input_ids"]).logits)
    given.sum().backward()
    assert calls == ["tower"]
    assert all((p.grad == 0).all() for p in model.model.multi_modal_projector.parameters())


def test_the_tower_stays_in_evaluation_mode(llava_folder):
    model, _, _ = load(ModelSection(path=str(llava_folder)))
    assert model.training and not model.model.vision_tower.training
