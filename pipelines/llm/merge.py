"""Merge an adapter into its base model: ``dora merge llm --adapter FOLDER --output FOLDER [--base MODEL]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dora_core.adapters import load_adapter, merge_and_unload
from dora_core.adapters.stored import named_base
from dora_core.config import require
from dora_core.engine.build import narrow_forward
from dora_core.engine.export import save_model
from dora_core.training.script import run_script
from pipelines.llm.config import ModelSection
from pipelines.llm.model import load_model, load_tokenizer


def main(arguments: Sequence[str]) -> None:
    """Load base and adapter on the CPU, merge, report the largest logit difference and save without a trace of it."""
    parser = argparse.ArgumentParser(prog="dora merge llm", allow_abbrev=False)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of an adapter in PEFT's layout")
    parser.add_argument("--output", type=Path, required=True, help="folder for the merged model")
    parser.add_argument("--base", help="base model; what adapter_config.json names if not given")
    parser.add_argument(
        "--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="type of the merged weights"
    )
    own = parser.parse_args(arguments)
    run_script(lambda: merge(own.adapter, own.output, own.base, own.precision))


def merge(adapter: Path, output: Path, base: str | None = None, precision: str = "bf16") -> None:
    """Merge ``adapter`` into ``base`` and write model and tokenizer to ``output``."""
    base = named_base(adapter) if base is None else base
    require(bool(base), "--base", base, "given where adapter_config.json names no base model", "Pass --base MODEL.")
    section = ModelSection(path=base)
    model = load_model(section, precision).eval()
    _, report = load_adapter(model, adapter)
    narrow_forward(model, precision, "cpu")
    print(report)
    print(f"merged {merge_and_unload(model)}")
    save_model(model, output, precision)
    has_tokenizer = any(adapter.glob("tokenizer*"))
    load_tokenizer(ModelSection(path=base, tokenizer=str(adapter) if has_tokenizer else None)).save_pretrained(output)
    print(f"wrote {output}")
