"""Write a small random BART, a world of moving shapes and its features: ``dora prepare video FOLDER``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from dora_core.testing.clip_files import clip_texts, read_lines, write_clips
from dora_core.testing.clip_texts import PHRASES
from dora_core.testing.clips import SOURCES
from dora_core.testing.picture_tasks import PHRASES as PICTURE_PHRASES
from dora_core.testing.picture_tasks import picture_texts, write_picture_tasks
from dora_core.testing.tiny_bart import save_tiny_bart
from pipelines.video.encode import EXTRA_TOKENS
from pipelines.video.extract import extract
from pipelines.video.features import load_encoder

ENCODER = "pixels:16"
"""A frame seen as 16 x 16 colours: needs no pretrained weights, and a tiny model learns to read it."""
PICTURES = ("COCO", "VG", "GQA", "nlvr")


def main(arguments: Sequence[str]) -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(prog="dora prepare video", allow_abbrev=False)
    parser.add_argument(
        "folder", type=Path, help="model and features go to FOLDER/model and /features, the rest beside"
    )
    parser.add_argument("--clips", type=int, default=300, help="to train on")
    parser.add_argument("--tested", type=int, default=60, help="clips to test on")
    parser.add_argument("--pictures", type=int, default=120, help="per collection, to train on")
    parser.add_argument("--seed", type=int, default=0)
    own = parser.parse_args(arguments)
    prepare(own.folder, own.clips, own.tested, own.pictures, own.seed)
    print(f"wrote {own.folder}")


def prepare(folder: Path, num_clips: int = 300, num_tested: int = 60, num_pictures: int = 120, seed: int = 0) -> None:
    """Write the world into ``folder``, its features, and a random model that knows its words into ``folder/model``.

    ``folder/pretraining`` has the annotations of clips without the questions that need several frames.
    """
    write_clips(folder, seed, num_clips, num_tested)
    _write_pretraining(folder / "video" / "ann", folder / "pretraining" / "video" / "ann")
    media = {source: folder / "video" / "videos" / source for source in SOURCES}
    texts = [clip_texts(folder)]
    if num_pictures:
        write_picture_tasks(folder, seed, num_pictures)
        media |= {name: folder / "images" / name for name in PICTURES}
        texts.append(picture_texts(folder))
    encoder = load_encoder(ENCODER, "frame")
    for name, where in media.items():
        extract(where, folder / "features" / name, encoder, say=lambda text: None)
    phrases = [*PHRASES, *PICTURE_PHRASES]
    save_tiny_bart(folder / "model", chain(*texts), phrases=phrases, seed=seed, init_std=0.1, extra_tokens=EXTRA_TOKENS)


def _write_pretraining(annotations: Path, folder: Path) -> None:
    """Write the same annotations without the questions that need several frames, to pre-train a base on."""
    for file in annotations.rglob("*.jsonl"):
        rows = [row for row in read_lines(file) if row.get("show_name") != "motion"]
        target = folder / file.relative_to(annotations)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
