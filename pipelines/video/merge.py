"""Merge an adapter into a VL-BART: ``dora merge video --adapter FOLDER --output FOLDER [--base MODEL]``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dora_core.adapters.stored import read_adapter
from dora_core.config import ConfigError
from dora_core.engine.export import merge_to_folder
from dora_core.training.script import run_merge
from pipelines.video.config import ModelSection
from pipelines.video.model import load_tokenizer, load_vl_bart, visual_dim_of
from pipelines.video.vl_bart import VLBart

FEATURE_WEIGHT = "model.encoder.visual_embedding.feature.0.weight"
NUM_PROBED = 16
"""Words, and visual tokens, on which logits are compared."""


def main(arguments: Sequence[str]) -> None:
    """Load base and adapter on the CPU, merge, report the largest logit difference, save."""
    run_merge("video", merge, arguments, precision="fp32")


def merge(adapter: Path, output: Path, base: str, precision: str = "fp32") -> None:
    """Merge ``adapter`` into ``base`` and write model and tokenizer to ``output``."""
    has_tokenizer = any(adapter.glob("tokenizer*"))
    section = ModelSection(path=base, tokenizer=str(adapter) if has_tokenizer else None)
    tokenizer = load_tokenizer(section)
    weight = read_adapter(adapter).extras.get(FEATURE_WEIGHT)
    dim = visual_dim_of(base) if weight is None else weight.shape[1]
    if dim is None:
        raise ConfigError(
            f"{adapter} holds no visual embedding, and {base} is a plain BART without one, so the size of its features "
            "is unknown. Give the VL-BART that the adapter was trained on as --base."
        )
    model = load_vl_bart(section, tokenizer, dim, precision)
    merge_to_folder(model, adapter, output, precision, probe(model))
    tokenizer.save_pretrained(output)


def probe(model: VLBart) -> dict[str, Tensor]:
    """Return some words and features of noise, to compare a model's logits before and after a change."""
    generator = torch.Generator().manual_seed(0)
    words = torch.arange(1, NUM_PROBED + 1)[None] * 7919 % model.config.vocab_size
    features = torch.randn(1, NUM_PROBED, model.config.visual_dim, generator=generator)
    return {
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "features": features,
        "decoder_input_ids": words,
    }
