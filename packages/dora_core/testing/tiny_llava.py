"""A tiny random LLaVA with its tokenizer and preprocessing, saved as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dora_core.testing.tiny import SPECIAL_TOKENS, train_tokenizer

IMAGE_TOKEN = "<image>"


def save_tiny_llava(
    folder: str | Path,
    texts: Iterable[str],
    *,
    vocab_size: int = 1024,
    phrases: Sequence[str] = (),
    image_size: int = 32,
    patch_size: int = 16,
    tower_hidden: int = 64,
    tower_layers: int = 3,
    hidden: int = 96,
    layers: int = 3,
    heads: int = 4,
    seed: int = 0,
    init_std: float = 0.05,
) -> LlavaForConditionalGeneration:
    """Save and return a LLaVA whose fp32 weights depend on the seed alone; the global generator is left as it was.

    The tokenizer is trained on ``texts``; each of ``phrases`` is one token. An image becomes
    ``(image_size / patch_size) ** 2`` tokens, taken from the tower's last but one layer without its class token.
    """
    tokenizer = train_tokenizer(texts, vocab_size, folder, phrases)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=tower_hidden,
        intermediate_size=3 * tower_hidden,
        num_hidden_layers=tower_layers,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=tower_hidden,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        initializer_range=init_std,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(image_size // patch_size) ** 2,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        initializer_range=init_std,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        tower = model.model.vision_tower
        # CLIP draws positions so small that a tiny tower takes long to tell places apart
        torch.nn.init.normal_(getattr(tower, "vision_model", tower).embeddings.position_embedding.weight, std=0.5)
    model.save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
    }
    text_of = json.dumps(preprocessing, indent=2) + "\n"
    (Path(folder) / "preprocessor_config.json").write_text(text_of, encoding="utf-8")
    return model
