"""Put a LLaVA together from a language model, a vision tower and a projector."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dora_core.adapters.sharded import gathered
from dora_core.config import ConfigError, require
from dora_core.engine import pretrained
from dora_core.engine.zero import Zero
from pipelines.vlm import original
from pipelines.vlm.config import ModelSection
from pipelines.vlm.conversation import IMAGE_MARK
from pipelines.vlm.towers import (
    OPEN_CLIP,
    OpenClipTower,
    VisionFacts,
    facts_of,
    load_open_clip_tower,
    load_transformers_tower,
    tower_config,
)

_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def assemble(
    section: ModelSection,
    raw: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    zero: Zero | None,
    seed: int,
) -> tuple[LlavaForConditionalGeneration, VisionFacts]:
    """Return a LLaVA put together from its parts, or from the checkpoint of the original repository whose config is
    ``raw``, and what its tower's pixels must be. Every rank must call it (ZeRO-3). Raises ``ConfigError``.
    """
    is_original = section.path is not None
    if is_original:
        original.require_llava15(raw, section.path)
    tower_name = section.vision_tower or raw["mm_vision_tower"]
    feature_layer = raw["mm_vision_select_layer"] if is_original else section.feature_layer
    foreign = tower_name.startswith(OPEN_CLIP)
    with zero.sharded_loading() if zero else nullcontext():
        language_model = _load_language_model(section, raw, dtype)
        _require_plain_logits(language_model)
        _fit_vocabulary(language_model, len(tokenizer))
        tower = None if foreign else load_transformers_tower(tower_name, dtype, section.attention)
    if foreign:
        tower, vision = load_open_clip_tower(tower_name, feature_layer)
        tower.to(dtype)
    else:
        vision = facts_of(tower_config(tower_name), tower_name)
        require(
            -feature_layer <= tower.config.num_hidden_layers + 1,
            "model.feature_layer",
            feature_layer,
            f"at least {-tower.config.num_hidden_layers - 1}, the layers of {tower_name} and their input",
        )
    config = LlavaConfig(
        text_config=language_model.config,
        vision_config=tower.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        image_seq_length=vision.num_tokens,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="full" if isinstance(tower, OpenClipTower) else "default",
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.model.vision_tower = tower
    model.model.multi_modal_projector = _random_projector(model.model.multi_modal_projector, seed).to(dtype)
    model.generation_config = language_model.generation_config
    model.set_attn_implementation(section.attention)  # making the shell has reset what the parts were loaded with
    if is_original and section.vision_tower is None:
        original.copy_tensors(tower, original.read_tower(section.path))
    if section.projector or is_original:
        source = section.projector or original.local_folder(section.path)
        original.copy_tensors(model.model.multi_modal_projector, original.read_projector(source))
    return model, vision


def _load_language_model(section: ModelSection, raw: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": section.attention}
    try:
        if section.path is not None:
            options["config"] = original.language_config(raw)
            return AutoModelForCausalLM.from_pretrained(original.local_folder(section.path), **options)
        return AutoModelForCausalLM.from_pretrained(section.language_model, **options)
    except (OSError, ValueError, ImportError) as error:
        name = section.path or section.language_model
        raise ConfigError(pretrained.not_found("language model", name, error)) from None


def _require_plain_logits(language_model: PreTrainedModel) -> None:
    """Refuse models that change their logits after the output layer, which LLaVA's class does not."""
    for name in _LOGIT_CHANGES:
        value = getattr(language_model.config, name, None)
        if value not in (None, 1, 1.0):
            raise ConfigError(
                f"The language model {language_model.config.model_type!r} has {name} {value}, which a LLaVA does not "
                "compute. Use a model without it, such as LLaMA, Vicuna, Mistral or Qwen."
            )


def _fit_vocabulary(language_model: PreTrainedModel, num_tokens: int) -> None:
    """Make room for added tokens. Their rows are the mean of all, so that none of them is ever the likeliest."""
    before = language_model.config.vocab_size
    if num_tokens <= before:
        return
    language_model.resize_token_embeddings(num_tokens, pad_to_multiple_of=64, mean_resizing=False)
    embeddings = {
        id(m.weight): m.weight for m in (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    }
    for weight in embeddings.values():
        with torch.no_grad(), gathered([weight], modify=True):
            weight[before:] = weight[:before].float().mean(0).to(weight.dtype)


def _random_projector(shape: nn.Module, seed: int) -> nn.Module:
    """Return a projector of the shape of one on the meta device, its weights as ``nn.Linear`` draws them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = shape.to_empty(device="cpu")
        for layer in (projector.linear_1, projector.linear_2):
            layer.reset_parameters()
    return projector.requires_grad_(True)
