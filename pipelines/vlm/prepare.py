"""Write a small random LLaVA with a tokenizer of its own, and a world of pictures: ``dora prepare vlm FOLDER``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dora_core.testing.scene_files import caption_texts, write_scenes
from dora_core.testing.scene_texts import PHRASES
from dora_core.testing.tiny_llava import save_tiny_llava


def main(arguments: Sequence[str]) -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(prog="dora prepare vlm", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="the model goes to FOLDER/model, the world to FOLDER")
    parser.add_argument("--captions", type=int, default=12_000)
    parser.add_argument("--conversations", type=int, default=3_000)
    parser.add_argument("--questions", type=int, default=120, help="per benchmark")
    parser.add_argument("--seed", type=int, default=0)
    own = parser.parse_args(arguments)
    prepare(own.folder, own.captions, own.conversations, own.questions, own.seed)
    print(f"wrote {own.folder}")


def prepare(
    folder: Path, num_captions: int = 12_000, num_conversations: int = 3_000, num_questions: int = 120, seed: int = 0
) -> None:
    """Write the world into ``folder`` and a random model that knows its words into ``folder/model``."""
    write_scenes(folder, seed, num_captions, num_conversations, num_questions)
    save_tiny_llava(folder / "model", caption_texts(folder), phrases=PHRASES, seed=seed)
