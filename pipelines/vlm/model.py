"""Load or assemble a LLaVA, say how its parts learn, and compute its loss.

Whatever it comes from, the model is transformers' ``LlavaForConditionalGeneration``.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedTokenizerBase

from dora_core.config import ConfigError
from dora_core.engine import pretrained
from dora_core.engine.build import DTYPES, Engine, recipe_groups
from dora_core.engine.loss import summed_cross_entropy
from dora_core.engine.zero import Zero
from pipelines.vlm import original
from pipelines.vlm.assemble import assemble
from pipelines.vlm.config import ModelSection, VLMTrainSection
from pipelines.vlm.conversation import IMAGE_MARK
from pipelines.vlm.towers import OpenClipTower, VisionFacts, facts_of


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Return the fast tokenizer, in which ``<image>`` is one token, added at the end if it is none yet."""
    tokenizer = pretrained.load_tokenizer(section.tokenizer or section.path or section.language_model)
    if IMAGE_MARK not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def load_llava(
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    precision: str,
    zero: Zero | None = None,
    *,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, VisionFacts]:
    """Return the model in training mode, its tower in evaluation mode, and what its tower's pixels must be.

    Weights are in ``precision``, frozen or not as they come; under ZeRO-3 they are partitioned as they are read, and
    every rank must call it. ``seed`` is for a projector that has no weights yet. Raises ``ConfigError``.
    """
    raw = {} if section.path is None else _raw_config(section.path)
    if section.path is None or original.is_original(raw):
        model, vision = assemble(section, raw, tokenizer, DTYPES[precision], zero, seed)
    else:
        _require_whole_llava(section, raw)
        model, vision = _load_whole(section, DTYPES[precision], zero)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    if model.config.image_token_id != image_id:
        raise ConfigError(
            f"The model's image token is {model.config.image_token_id}, the tokenizer's {IMAGE_MARK} is {image_id}. "
            "Set model.tokenizer to the tokenizer that belongs to the model."
        )
    _always_run_vision(model.model)
    model.train()
    model.model.vision_tower.eval()
    return model, vision


def has_foreign_tower(model: LlavaForConditionalGeneration) -> bool:
    """Whether the tower has no class in transformers, so that the whole model cannot be saved for it."""
    return isinstance(model.model.vision_tower, OpenClipTower)


def param_groups(model: LlavaForConditionalGeneration, train: VLMTrainSection) -> list[dict]:
    """Return the recipe's optimizer groups, those of the projector apart where it has a learning rate of its own."""
    groups = recipe_groups(model, train)
    if train.projector_lr is None:
        return groups
    projector = {id(parameter) for parameter in model.model.multi_modal_projector.parameters()}
    parted = []
    for group in groups:
        inside = [p for p in group["params"] if id(p) in projector]
        outside = [p for p in group["params"] if id(p) not in projector]
        is_adapter = group["name"] in ("A", "B", "magnitude")  # of an adapted projector: with the other adapters
        if is_adapter or not inside:
            parted.append(group)
            continue
        parted += [{**group, "params": outside}] * bool(outside)
        parted.append({**group, "name": f"projector_{group['name']}", "params": inside, "lr": train.projector_lr})
    return parted


def instruction_loss(engine: Engine, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy in fp32 *summed* over the labels that are not -100, each predicted one token before.

    ``batch`` is what ``to_model`` returns. Logits are made only at places where some row of the batch has a label:
    neither system prompt nor image tokens have any.
    """
    # Rows are padded on the right and attention is causal: a mask of padding would only make it slower.
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "attention_mask")}
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    places = (labels != -100).any(0).nonzero().squeeze(1)
    return summed_cross_entropy(engine, inputs | {"logits_to_keep": places}, labels[:, places])


def _load_whole(
    section: ModelSection, dtype: torch.dtype, zero: Zero | None
) -> tuple[LlavaForConditionalGeneration, VisionFacts]:
    try:
        with zero.sharded_loading() if zero else nullcontext():
            if section.from_scratch:
                config = LlavaConfig.from_pretrained(section.path)
                place = (
                    torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else nullcontext()
                )
                with place:
                    model = LlavaForConditionalGeneration._from_config(
                        config, dtype=dtype, attn_implementation=section.attention
                    )
            else:
                model = LlavaForConditionalGeneration.from_pretrained(
                    section.path, dtype=dtype, attn_implementation=section.attention
                )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(pretrained.not_found("model", section.path, error)) from None
    if section.projector is not None:
        original.copy_tensors(model.model.multi_modal_projector, original.read_projector(section.projector))
    return model, facts_of(model.config.vision_config, section.path)


def _require_whole_llava(section: ModelSection, raw: dict[str, Any]) -> None:
    kind = raw.get("model_type")
    if kind != "llava":
        raise ConfigError(
            f"model.path {section.path!r} is a {kind!r} model; it must be a LLaVA. Give a language model as "
            "model.language_model, with model.vision_tower."
        )
    if section.vision_tower is not None:
        raise ConfigError(
            f"model.path {section.path!r} has a vision tower of its own, and model.vision_tower names "
            f"{section.vision_tower!r}. Set model.vision_tower: null, or give model.language_model, not model.path."
        )


def _raw_config(path: str) -> dict[str, Any]:
    try:
        return PreTrainedConfig.get_config_dict(path)[0]
    except (OSError, ValueError) as error:
        raise ConfigError(pretrained.not_found("model", path, error)) from None


def _always_run_vision(module: nn.Module) -> None:
    """Let tower and projector run for a batch whose images have no tokens: a blank one, on a rank with text alone.

    The features go nowhere, and the gradient of the projector is zero, not absent: under ZeRO-3 all ranks make the
    same calls, in the same order, and no rank waits for another.
    """
    plain = module.forward

    @wraps(plain)
    def forward(input_ids: Tensor | None = None, pixel_values: Tensor | None = None, **kwargs: Any) -> Any:
        has_pictures = pixel_values is not None or bool(kwargs.get("mm_encoder_outputs"))
        if input_ids is None or not has_pictures or bool((input_ids == module.config.image_token_id).any()):
            return plain(input_ids=input_ids, pixel_values=pixel_values, **kwargs)
        kwargs.pop("mm_encoder_outputs", None)  # of a blank image: ``generate`` has run the tower before the model
        if pixel_values is None:
            return plain(input_ids=input_ids, **kwargs)
        embeddings = module.get_input_embeddings()(input_ids)
        features = module.get_image_features(
            pixel_values=pixel_values,
            vision_feature_layer=module.config.vision_feature_layer,
            vision_feature_select_strategy=module.config.vision_feature_select_strategy,
            return_dict=True,
        ).pooler_output
        nothing = sum(image[:0].sum() for image in features).to(embeddings.dtype)
        return plain(**{**kwargs, "inputs_embeds": embeddings + nothing})

    module.forward = forward
