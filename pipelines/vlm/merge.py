"""Merge an adapter into a LLaVA: ``dora merge vlm --adapter FOLDER --output FOLDER [--base MODEL]``."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from dora_core.adapters import load_adapter
from dora_core.adapters.report import AdapterReport
from dora_core.adapters.stored import named_base
from dora_core.config import load_config, require, split_arguments
from dora_core.engine.export import merge_to_folder
from dora_core.training.script import run_script
from pipelines.vlm.config import RECIPES, ModelSection, VLMConfig
from pipelines.vlm.export import require_savable, save_processor
from pipelines.vlm.model import load_llava, load_tokenizer
from pipelines.vlm.original import convert_adapter, is_original_adapter
from pipelines.vlm.towers import VisionFacts


def main(arguments: Sequence[str]) -> None:
    """Load base and adapter on the CPU, merge, report the largest logit difference, save for transformers."""
    parser = argparse.ArgumentParser(prog="dora merge vlm", allow_abbrev=False)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of an adapter: PEFT's layout, or LLaVA's")
    parser.add_argument("--output", type=Path, required=True, help="folder for the merged model")
    parser.add_argument("--base", help="base LLaVA; what adapter_config.json or the recipe names if not given")
    parser.add_argument(
        "--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="type of the merged weights"
    )
    own, rest = parser.parse_known_args(arguments)
    recipe, overrides = split_arguments(rest)

    def run() -> None:
        section, template = None, "v1"
        if recipe is not None or overrides:
            cfg = load_config(VLMConfig, recipe, overrides, recipes=RECIPES)
            section, template = cfg.model, cfg.data.template
        section = ModelSection(path=own.base) if own.base else section
        merge(own.adapter, own.output, section, own.precision, template)

    run_script(run)


def merge(
    adapter: Path,
    output: Path,
    section: ModelSection | None = None,
    precision: str = "bf16",
    template: str = "v1",
) -> None:
    """Merge ``adapter`` into the model of ``section`` (or the one it names) and write it with its processor."""
    if section is None:
        base = named_base(adapter)
        change = "Pass --base MODEL, or --config RECIPE for an assembled model."
        require(bool(base), "--base", base, "given where adapter_config.json names no base model", change)
        section = ModelSection(path=base)
    tokenizer = load_tokenizer(section)
    model, vision = load_llava(section, tokenizer, precision)
    require_savable(model)
    merge_to_folder(model, adapter, output, precision, probe(model, vision), load_any_adapter)
    save_processor(output, model, tokenizer, vision, template)


def load_any_adapter(model: LlavaForConditionalGeneration, folder: Path) -> AdapterReport | None:
    """Put an adapter and its projector into the model: in PEFT's layout, or as the original repository left it."""
    if not is_original_adapter(folder):
        return load_adapter(model, folder)[1]
    with tempfile.TemporaryDirectory() as converted:
        return load_adapter(model, convert_adapter(folder, Path(converted)))[1]


def probe(model: LlavaForConditionalGeneration, vision: VisionFacts) -> dict[str, Tensor]:
    """Return a picture of noise with some tokens after it, to compare a model's logits before and after a change."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.text_config.vocab_size
    words = torch.arange(1, 33) * 7919 % vocabulary
    words[words == model.config.image_token_id] = 0
    ids = torch.cat([torch.full((vision.num_tokens,), model.config.image_token_id), words])[None]
    parameter = model.lm_head.weight
    pixels = torch.randn(1, 3, vision.size, vision.size, generator=generator)
    return {"input_ids": ids.to(parameter.device), "pixel_values": pixels.to(parameter.device, parameter.dtype)}
