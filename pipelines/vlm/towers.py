"""Vision towers: transformers' CLIP, or any model of open_clip; this is the pipeline's only importer of open_clip.

A tower is called as ``tower(pixel_values [N, 3, size, size])`` and has ``hidden_states``, of which LLaVA takes one.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import cached_file

from dora_core.config import ConfigError
from dora_core.engine.pretrained import not_found
from dora_core.media.images import CLIP_MEAN, CLIP_STD
from dora_core.registry import unknown_name

OPEN_CLIP = "open_clip:"


@dataclass(frozen=True)
class VisionFacts:
    """What the pixels of a tower must be, and how many tokens an image becomes."""

    size: int
    """Images are size x size pixels."""
    num_tokens: int
    """Tokens per image, the class token left out."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: str = "bicubic"


class OpenClipTower(nn.Module):
    """A vision model of open_clip that transformers has no class for, behind the interface of those that it has."""

    def __init__(self, visual: nn.Module, feature_layer: int, size: int) -> None:
        super().__init__()
        self.visual = visual
        self.feature_layer = feature_layer
        with torch.no_grad():
            features = self._features(torch.zeros(1, 3, size, size))
        # transformers reads sizes and options from a config; there is no class to say more about
        width = features.shape[-1]
        self.config = CLIPVisionConfig(hidden_size=width, image_size=size, num_hidden_layers=1, num_attention_heads=1)
        self.num_tokens = features.shape[1]

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Return features [N, tokens, width] as the hidden state that ``feature_layer`` counts to."""
        features = self._features(pixel_values.to(next(self.parameters()).dtype))
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features,) * -self.feature_layer)

    def _features(self, pixel_values: Tensor) -> Tensor:
        done = self.visual.forward_intermediates(
            pixel_values, indices=[self.feature_layer], intermediates_only=True, output_fmt="NCHW"
        )
        return done["image_intermediates"][0].flatten(2).transpose(1, 2)


def load_open_clip_tower(name: str, feature_layer: int) -> tuple[nn.Module, VisionFacts]:
    """Return the tower ``open_clip:<model>[:<tag or file>]`` in fp32 and its own preprocessing.

    A plain CLIP transformer becomes transformers' ``CLIPVisionModel``, whose outputs are the same; others are wrapped.
    Without a tag or file the weights are random. Raises ``ConfigError`` for an unknown model or tag.
    """
    import open_clip

    model_name, _, tag = name.removeprefix(OPEN_CLIP).partition(":")
    if model_name not in open_clip.list_models():
        raise unknown_name("open_clip model", model_name, sorted(open_clip.list_models()))
    # OpenAI's weights need another activation than the models of their name have, of which open_clip only warns
    quick = bool(open_clip.get_pretrained_cfg(model_name, tag).get("quick_gelu")) if tag else False
    quiet, before = logging.getLogger(), logging.getLogger().level
    try:
        quiet.setLevel(logging.ERROR)  # it warns of random weights, which were asked for
        model = open_clip.create_model(
            model_name, pretrained=tag or None, force_quick_gelu=quick, require_pretrained=bool(tag)
        )
    except Exception as error:  # open_clip raises RuntimeError, OSError and what the hub client raises
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none"
        raise ConfigError(
            not_found("open_clip model", name, error) + f" Pretrained tags of {model_name}: {tags}."
        ) from None
    finally:
        quiet.setLevel(before)
    own = open_clip.get_model_preprocess_cfg(model)
    size = own["size"][0] if isinstance(own["size"], list | tuple) else own["size"]
    colours = {"mean": tuple(own["mean"]), "std": tuple(own["std"]), "resample": own["interpolation"]}
    visual = model.visual.eval()
    if _is_plain_clip(visual):
        tower: nn.Module = _as_transformers(visual, size)
        return tower, VisionFacts(size, (size // tower.config.patch_size) ** 2, **colours)
    if not hasattr(visual, "forward_intermediates"):
        raise ConfigError(f"{name} is a {type(visual).__name__}, which gives no features before its pooling.")
    tower = OpenClipTower(visual, feature_layer, size)
    return tower, VisionFacts(size, tower.num_tokens, **colours)


def load_transformers_tower(name: str, dtype: torch.dtype, attention: str) -> nn.Module:
    """Return the CLIP vision model ``name``, alone or out of a whole CLIP; may be called with sharded loading."""
    kind = tower_config(name).model_type
    if kind != "clip_vision_model":
        raise ConfigError(
            f"The vision tower {name!r} is a {kind!r} model; it must be a CLIP vision model, alone or in a whole CLIP. "
            f"Others may be had from open_clip: model.vision_tower: {OPEN_CLIP}<name>."
        )
    try:
        return CLIPVisionModel.from_pretrained(name, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError) as error:
        raise ConfigError(not_found("vision tower", name, error)) from None


def facts_of(config: Any, path: str | None) -> VisionFacts:
    """Return the facts of a transformers tower from its config and the preprocessing that is saved at ``path``.

    Without a ``preprocessor_config.json`` or ``processor_config.json`` the pixels are CLIP's.
    """
    size = config.image_size
    num_tokens = (size // config.patch_size) ** 2
    raw = _preprocessor(path)
    if raw is None:
        return VisionFacts(size, num_tokens)
    crop = raw.get("crop_size", raw.get("size", size))
    given = crop if isinstance(crop, int) else crop.get("height", crop.get("shortest_edge", size))
    if given != size:
        raise ConfigError(
            f"{path}: its preprocessing makes images of {given} pixels, the vision tower takes {size}. Use the "
            "files of one model."
        )
    mean, std = tuple(raw.get("image_mean", CLIP_MEAN)), tuple(raw.get("image_std", CLIP_STD))
    return VisionFacts(
        size, num_tokens, mean, std, {2: "bilinear", 3: "bicubic"}.get(raw.get("resample", 3), "bicubic")
    )


def tower_config(name: str) -> Any:
    """Return the vision config of a transformers model."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(not_found("vision tower", name, error)) from None
    return getattr(config, "vision_config", config)


def _preprocessor(path: str | None) -> dict | None:
    """Return the settings of the image processor, which transformers has saved in one file or in the other."""
    for name in () if path is None else ("preprocessor_config.json", "processor_config.json"):
        file = Path(path) / name
        if not Path(path).exists():
            try:
                found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
            except OSError:  # neither reachable nor cached, as the model then is too
                found = None
            file = Path(found) if found else file
        if file.is_file():
            raw = json.loads(file.read_text(encoding="utf-8"))
            settings = raw if name.startswith("pre") else raw.get("image_processor")
            if settings:
                return settings
    return None


def _is_plain_clip(visual: nn.Module) -> bool:
    """Whether transformers' CLIP computes the same: one class token, learned positions, no extra scales or norms."""
    names = {name.split(".resblocks.")[0] for name, _ in visual.named_parameters()}
    expected = {"class_embedding", "positional_embedding", "conv1.weight", "transformer", "proj"}
    expected |= {f"{norm}.{kind}" for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    block = {name for name, _ in visual.named_parameters() if ".resblocks.0." in name}
    return type(visual).__name__ == "VisionTransformer" and names == expected and len(block) == 12


def _as_transformers(visual: nn.Module, size: int) -> CLIPVisionModel:
    blocks = visual.transformer.resblocks
    act = type(blocks[0].mlp.gelu).__name__
    config = CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        image_size=size,
        patch_size=visual.conv1.kernel_size[0],
        hidden_act="quick_gelu" if act == "QuickGELU" else "gelu",
        projection_dim=visual.output_dim,
        layer_norm_eps=blocks[0].ln_1.eps,
    )
    tower = CLIPVisionModel(config)
    state = {
        "embeddings.class_embedding": visual.class_embedding,
        "embeddings.patch_embedding.weight": visual.conv1.weight,
        "embeddings.position_embedding.weight": visual.positional_embedding,
    }
    renamed = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    state |= {f"{renamed[n]}.{k}": getattr(getattr(visual, n), k) for n in renamed for k in ("weight", "bias")}
    for place, block in enumerate(blocks):
        start = f"encoder.layers.{place}."
        for kind in ("weight", "bias"):
            for part, tensor in zip("qkv", getattr(block.attn, f"in_proj_{kind}").chunk(3), strict=True):
                state[f"{start}self_attn.{part}_proj.{kind}"] = tensor
            state[f"{start}self_attn.out_proj.{kind}"] = getattr(block.attn.out_proj, kind)
            for own, other in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
                state[f"{start}{other}.{kind}"] = getattr(getattr(block, own), kind)
            for own, other in (("c_fc", "mlp.fc1"), ("c_proj", "mlp.fc2")):
                state[f"{start}{other}.{kind}"] = getattr(getattr(block.mlp, own), kind)
    inner = tower if hasattr(tower, "encoder") else tower.vision_model
    inner.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
    return tower.eval()
