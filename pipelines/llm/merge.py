"""Merge an adapter into its base model: ``dora merge llm --adapter FOLDER --output FOLDER [--base MODEL]``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dora_core.engine.export import merge_to_folder
from dora_core.training.script import run_merge
from pipelines.llm.config import ModelSection
from pipelines.llm.model import load_model, load_tokenizer


def main(arguments: Sequence[str]) -> None:
    """Load base and adapter on the CPU, merge, report the largest logit difference and save without a trace of it."""
    run_merge("llm", merge, arguments)


def merge(adapter: Path, output: Path, base: str, precision: str = "bf16") -> None:
    """Merge ``adapter`` into ``base`` and write model and tokenizer to ``output``."""
    merge_to_folder(load_model(ModelSection(path=base), precision), adapter, output, precision)
    has_tokenizer = any(adapter.glob("tokenizer*"))
    load_tokenizer(ModelSection(path=base, tokenizer=str(adapter) if has_tokenizer else None)).save_pretrained(output)
