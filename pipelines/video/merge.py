"""Merge an adapter into a VL-BART: ``dora merge video --adapter FOLDER --output FOLDER [--base MODEL]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dora_core.adapters import load_adapter, merge_and_unload
from dora_core.adapters.stored import named_base, read_adapter
from dora_core.config import ConfigError, require
from dora_core.engine.build import narrow_forward
from dora_core.engine.export import save_model
from dora_core.training.script import run_script
from pipelines.video.config import ModelSection
from pipelines.video.model import load_tokenizer, load_vl_bart, visual_dim_of
from pipelines.video.vl_bart import VLBart

FEATURE_WEIGHT = "model.encoder.visual_embedding.feature.0.weight"
NUM_PROBED = 16
"""Words, and visual tokens, on which logits are compared."""


def main(arguments: Sequence[str]) -> None:
    """Load base and adapter on the CPU, merge, report the largest logit difference, save."""
    parser = argparse.ArgumentParser(prog="dora merge video", allow_abbrev=False)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of an adapter in PEFT's layout")
    parser.add_argument("--output", type=Path, required=True, help="folder for the merged model")
    parser.add_argument("--base", help="base model; what adapter_config.json names if not given")
    parser.add_argument(
        "--precision", choices=("bf16", "fp16", "fp32"), default="fp32", help="type of the merged weights"
    )
    own = parser.parse_args(arguments)
    run_script(lambda: merge(own.adapter, own.output, own.base, own.precision))


def merge(adapter: Path, output: Path, base: str | None = None, precision: str = "fp32") -> None:
    """Merge ``adapter`` into ``base`` and write model and tokenizer to ``output``."""
    base = named_base(adapter) if base is None else base
    require(bool(base), "--base", base, "given where adapter_config.json names no base model", "Pass --base MODEL.")
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
    model = load_vl_bart(section, tokenizer, dim, precision).eval()
    _, report = load_adapter(model, adapter)
    narrow_forward(model, precision, "cpu")
    print(report)
    print(f"merged {merge_and_unload(model, probe(model))}")
    save_model(model, output, precision)
    tokenizer.save_pretrained(output)
    print(f"wrote {output}")


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
