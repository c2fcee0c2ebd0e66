from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dora_core.testing.tiny import train_tokenizer
from pipelines.vlm.conversation import IMAGE_MARK, SYSTEM

WORDS = ("what colour is it red green blue", "how many shapes are there one two three", "USER: ASSISTANT: yes no a bus")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer in which the system prompt and ``<image>`` are one token each."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(WORDS * 20, 400, folder, [SYSTEM])
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A random LLaVA of two language layers and three tower layers, 16 tokens an image, with its tokenizer."""
    folder = tmp_path_factory.mktemp("llava")
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    image_id = next(token["id"] for token in tokens if token["content"] == IMAGE_MARK)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=image_id + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_id, image_seq_length=16, pad_token_id=3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    facts = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.4, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps({**facts, "image_std": [0.2, 0.3, 0.4], "resample": 3}))
    return folder
