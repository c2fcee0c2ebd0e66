from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dora_core.testing.tiny_bart import save_tiny_bart

COLOURS = ("red", "blue", "green")
DIM = 12
SPLITS = {"train": 24, "val": 6, "test": 6}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def features_of(colour: int, length: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 0.1, (length, DIM))
    return (noise + np.eye(DIM)[colour]).astype(np.float16)


def write_dataset(root: Path) -> None:
    """Write annotations and features of all eight tasks, in the published layouts; colours are what there is to see."""
    draw = random.Random(0)
    shown = {}
    for split, count in SPLITS.items():
        for number in range(count):
            for collection in ("tv", "how2", "yc2", "COCO", "VG", "GQA", "nlvr"):
                for name in (f"{split}{number}", f"{split}{number}b"):
                    colour, length = draw.randrange(3), draw.randint(2, 9) if collection in ("tv", "how2", "yc2") else 4
                    shown[collection, name] = colour
                    folder = root / collection
                    folder.mkdir(parents=True, exist_ok=True)
                    np.savez(folder / f"{name}.npz", features=features_of(colour, length, len(shown)))
    for split, count in SPLITS.items():
        _write_video_tasks(root, split, [f"{split}{number}" for number in range(count)], shown)
        _write_image_tasks(root, split, [f"{split}{number}" for number in range(count)], shown)
    for name, collection in (("tv", "tv"), ("how2", "how2"), ("yc2", "yc2")):
        videos = [video for where, video in shown if where == collection]
        speech = [{"text": "hello there", "start": 0, "end": 1}, {"text": "it is red", "start": 1, "end": 2}]
        write_lines(root / f"video/ann/{name}_subtitles.jsonl", [{"vid_name": each, "sub": speech} for each in videos])


def _write_video_tasks(root: Path, split: str, names: list[str], shown: dict) -> None:
    ann = root / "video" / "ann"
    for task, collection, num_choices in (("tvqa", "tv", 5), ("how2qa", "how2", 4)):
        choices = {f"a{place}": (*COLOURS, "none", "all")[place] for place in range(num_choices)}
        rows = [
            {
                "qid": place,
                "q": "what colour is it",
                **choices,
                "answer_idx": shown[collection, name],
                "ts": "0.5-2.25",
                "vid_name": name,
                "show_name": "still",
            }
            for place, name in enumerate(names)
        ]
        file = {"train": "train", "val": "val", "test": "test_public"}[split]
        write_lines(ann / task / f"{task}_{file}{'_release' if task == 'how2qa' else ''}.jsonl", rows)
    for task, collection in (("tvc", "tv"), ("yc2c", "yc2")):
        rows = [
            {
                "vid_name": name,
                "clip_id": place,
                "duration": 3.0,
                "ts": [0.5, 2.25],
                "descs": [
                    {"desc": f"a {COLOURS[shown[collection, name]]} thing", "desc_id": 0},
                    {"desc": f"something {COLOURS[shown[collection, name]]} moves", "desc_id": 1},
                ][: 1 if task == "yc2c" else 2],
            }
            for place, name in enumerate(names)
        ]
        write_lines(ann / task / f"{task}_{split}_release.jsonl", rows)


def _write_image_tasks(root: Path, split: str, names: list[str], shown: dict) -> None:
    vqa = [
        {
            "question_id": place,
            "img_id": name,
            "sent": "what colour is it",
            "label": {COLOURS[shown["COCO", name]]: 1.0, "grey": 0.3},
            "question_type": "what colour",
            "answer_type": "other",
        }
        for place, name in enumerate(names)
    ]
    write_json(root / f"vqa/karpathy_{split}.json", vqa)
    file = {"train": "train", "val": "valid", "test": "testdev"}[split]
    for name_of_file in {file, "testdev"} if split != "train" else {file, "valid"}:
        where = "VG" if split == "train" else "GQA"
        gqa = [
            {
                "question_id": f"{split}{name_of_file}{place}",
                "img_id": name,
                "sent": "is it red",
                "label": {"yes" if shown[where, name] == 0 else "no": 1.0},
            }
            for place, name in enumerate(names)
        ]
        if not (split == "val" and name_of_file == "valid"):  # that file is the training split's too
            write_json(root / f"GQA/{name_of_file}.json", gqa)
    nlvr = [
        {
            "identifier": f"{split}-{place}-0-0",
            "uid": f"{split}{place}",
            "img0": name,
            "img1": f"{name}b",
            "sent": "both are alike",
            "label": int(shown["nlvr", name] == shown["nlvr", f"{name}b"]),
        }
        for place, name in enumerate(names)
    ]
    write_json(root / f"nlvr/{'valid' if split == 'val' else split}.json", nlvr)
    path = root / "COCO" / "dataset_coco.json"
    known = json.loads(path.read_text())["images"] if path.exists() else []
    known += [
        {
            "cocoid": len(known) + place,
            "filename": f"{name}.jpg",
            "split": "restval" if split == "train" and place % 2 else split,
            "sentences": [{"raw": f"A {COLOURS[shown['COCO', name]]} thing ."} for _ in range(2)],
        }
        for place, name in enumerate(names)
    ]
    write_json(path, {"images": known, "dataset": "coco"})


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as VL-Adapter's ``datasets``, with features of 12 numbers and a tiny BART in ``model``."""
    root = tmp_path_factory.mktemp("datasets")
    write_dataset(root)
    texts = [
        "[Subs] hello there it is red [Q] what colour is it [TS] (0.5-2.25) [Choices] a0: red. a1: blue. a2: green.",
        "a3: none. a4: all. tvqa: how2qa: tvc: yc2c: vqa: gpa: nlvr: caption: both are alike true false yes no",
        "a red thing something blue moves a green thing",
    ]
    save_tiny_bart(root / "model", texts * 20, vocab_size=500, hidden=32, init_std=0.2)
    return root
