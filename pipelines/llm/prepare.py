"""Write a small random LLaMA with a tokenizer of its own, and a synthetic world: ``dora prepare llm FOLDER``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dora_core.data.rows import read_rows
from dora_core.testing.formats import PHRASES
from dora_core.testing.tiny import save_tiny_llama
from dora_core.testing.world import write_world
from pipelines.llm.data import render


def main(arguments: Sequence[str]) -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(prog="dora prepare llm", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="the model goes to FOLDER/model, the world to FOLDER")
    parser.add_argument("--rows", help="train the tokenizer on these rows (file or folder) and write no world")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    own = parser.parse_args(arguments)
    prepare(own.folder, own.rows, own.vocab_size, own.hidden, own.layers, own.heads, own.seed)
    print(f"wrote {own.folder}")


def prepare(
    folder: Path,
    rows: str | None = None,
    vocab_size: int = 1024,
    hidden: int = 96,
    layers: int = 4,
    heads: int = 4,
    seed: int = 0,
) -> None:
    """Write ``folder/model``, and the world into ``folder`` unless ``rows`` names others for the tokenizer."""
    if rows is None:
        write_world(folder, seed=seed)
        rows_of = [row for name in ("statements", "commonsense_mix") for row in read_rows(str(folder / f"{name}.json"))]
        texts = ["".join(render(row, "alpaca" if row["instruction"] else "plain")) for row in rows_of]
    else:
        texts = ["".join(render(row, "alpaca_reference")) for row in read_rows(rows)]
    phrases = PHRASES if rows is None else ()
    save_tiny_llama(folder / "model", texts, vocab_size, hidden, layers, heads, seed, phrases)
