"""Write the world of pictures: captions, conversations, and question files in the formats of seven benchmarks."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dora_core.testing import scene_texts as texts
from dora_core.testing.scenes import COLOURS, Scene, draw, make_scene

TEXT_ALONE = 0.05
"""Share of conversations without a picture."""


def write_scenes(
    folder: str | Path,
    seed: int = 0,
    num_captions: int = 12_000,
    num_conversations: int = 3_000,
    num_questions: int = 120,
) -> None:
    """Write ``captions.json``, ``instructions.json``, ``images/`` and ``eval/``, in which each benchmark has its files.

    Two captions share a picture. Every question of ``eval`` is about a scene that no other picture shows.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    _write_captions(folder, random.Random(f"{seed}/captions"), num_captions)
    _write_conversations(folder, random.Random(f"{seed}/conversations"), num_conversations)
    for name, write in BENCHMARKS.items():
        write(folder / "eval" / name, random.Random(f"{seed}/{name}"), num_questions)


def caption_texts(folder: str | Path) -> list[str]:
    """Return what is written in the rows of ``write_scenes``, as a tokenizer's training texts."""
    rows = [row for name in ("captions", "instructions") for row in _read(Path(folder) / f"{name}.json")]
    return [" ".join(turn["value"] for turn in row["conversations"]) for row in rows]


def _write_captions(folder: Path, rng: random.Random, number: int) -> None:
    rows = []
    for place in range(number):
        if place % 2 == 0:
            scene = make_scene(rng, for_testing=False, letters=0.25)
            _write(folder / "images" / f"caption-{place:06d}.jpg", draw(scene, rng))
        image = f"caption-{place - place % 2:06d}.jpg"
        rows.append(_row(f"caption-{place}", [("<image>", texts.caption(scene, rng))], image))
    _write_json(folder / "captions.json", rows)


def _write_conversations(folder: Path, rng: random.Random, number: int) -> None:
    rows = []
    for place in range(number):
        name = f"talk-{place:06d}"
        if rng.random() < TEXT_ALONE:
            rows.append(_row(name, texts.wordy_talk(rng), None))
            continue
        kind = place % len(texts.TALKS)
        scene = make_scene(rng, for_testing=False, letters=1.0 if texts.needs_letters(kind) else 0.2)
        _write(folder / "images" / f"{name}.jpg", draw(scene, rng))
        (question, answer), *others = texts.talk(kind, scene, rng)
        rows.append(_row(name, [(f"<image>\n{question}", answer), *others], f"{name}.jpg"))
    _write_json(folder / "instructions.json", rows)


def _row(name: str, turns: Iterable[texts.Asked], image: str | None) -> dict[str, Any]:
    talk = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {"id": name, **({"image": image} if image else {}), "conversations": talk}


def _annotators(answer: str, rng: random.Random) -> list[str]:
    """Return ten answers, one of which is somebody's slip."""
    answers = [answer] * 9 + [rng.choice((*COLOURS, "yes", "no"))]
    rng.shuffle(answers)
    return answers


def _write_vqav2(folder: Path, rng: random.Random, number: int) -> None:
    questions, annotations = [], []
    for place in range(1, number + 1):
        scene = _tested(rng)
        _write(folder / "val2014" / f"COCO_val2014_{place:012d}.jpg", draw(scene, rng))
        question, answer = texts.open_question(scene, rng)
        questions.append({"image_id": place, "question": question, "question_id": 1000 * place})
        given = [{"answer": text, "answer_id": n} for n, text in enumerate(_annotators(answer, rng), 1)]
        annotations.append({"question_id": 1000 * place, "image_id": place, "answers": given})
    _write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    _write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def _write_gqa(folder: Path, rng: random.Random, number: int) -> None:
    entries = {}
    for place in range(number):
        scene = _tested(rng)
        _write(folder / "data" / "images" / f"n{place}.jpg", draw(scene, rng))
        question, answer = texts.attribute_question(scene, rng)
        entries[f"{place:06d}"] = {"question": question, "answer": answer, "imageId": f"n{place}"}
    _write_json(folder / "testdev_balanced_questions.json", entries)


def _write_vizwiz(folder: Path, rng: random.Random, number: int) -> None:
    rows = []
    for place in range(number):
        scene = _tested(rng)
        image = f"VizWiz_val_{place:08d}.jpg"
        _write(folder / "val" / image, draw(scene, rng))
        question, answer = texts.doubtful_question(scene, rng)
        answers = [{"answer": text, "answer_confidence": "yes"} for text in _annotators(answer, rng)]
        rows.append({"image": image, "question": question, "answers": answers})
    _write_json(folder / "val.json", rows)


def _write_scienceqa(folder: Path, rng: random.Random, number: int) -> None:
    problems = {}
    for place in range(number):
        has_image = place % 6 > 0
        if has_image:
            scene = _tested(rng)
            _write(folder / "images" / "test" / str(place) / "image.jpg", draw(scene, rng))
            choice = texts.choice_question(scene, rng, rng.choice(texts.NUM_OPTIONS))
        else:
            choice = texts.word_question(rng)
        question, choices, answer = choice
        image = "image.jpg" if has_image else None
        problems[str(place)] = {"question": question, "choices": choices, "answer": answer, "hint": "", "image": image}
    _write_json(folder / "problems.json", problems)
    _write_json(folder / "pid_splits.json", {"test": list(problems)})


def _write_textvqa(folder: Path, rng: random.Random, number: int) -> None:
    entries, lines = [], []
    for place in range(number):
        scene = _tested(rng, letters=1.0)
        name = f"{place:016x}"
        _write(folder / "train_images" / f"{name}.jpg", draw(scene, rng))
        (question, answer), seen = texts.reading_question(scene, rng)
        answers = _annotators(answer.lower(), rng)
        entries.append({"question_id": place, "image_id": name, "question": question, "answers": answers})
        text = f"{question}\n{texts.OCR} {', '.join(seen)}\n{texts.SHORT}"
        lines.append({"question_id": name, "image": f"{name}.jpg", "text": text, "category": "default"})
    _write_json(folder / "TextVQA_0.5.1_val.json", {"data": entries})
    _write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", lines)


def _write_pope(folder: Path, rng: random.Random, number: int) -> None:
    for category in ("random", "popular", "adversarial"):
        lines = []
        for place in range(1, number // 3 + 1):
            scene = _tested(rng)
            image = f"{category}-{place}.jpg"
            _write(folder / "val2014" / image, draw(scene, rng))
            question, answer = texts.presence_question(scene, rng)
            lines.append({"question_id": place, "image": image, "text": question, "label": answer})
        _write_lines(folder / "coco" / f"coco_pope_{category}.json", lines)


def _write_mmbench(folder: Path, rng: random.Random, number: int) -> None:
    letters = "ABC"[: max(texts.NUM_OPTIONS)]
    header = ["index", "question", "hint", *letters, "answer", "image", "category", "l2-category"]
    lines = [header]
    for place in range(number):
        scene = _tested(rng)
        question, values, answer = texts.choice_question(scene, rng, len(letters))
        encoded = base64.b64encode(draw(scene, rng)).decode("ascii")
        lines.append([str(place), question, "", *values, letters[answer], encoded, "shapes", "perception"])
    text = "".join("\t".join(cells) + "\n" for cells in lines)
    _write(folder / "mmbench_dev_20230712.tsv", text.encode("utf-8"))


BENCHMARKS: dict[str, Callable[[Path, random.Random, int], None]] = {
    "vqav2": _write_vqav2,
    "gqa": _write_gqa,
    "vizwiz": _write_vizwiz,
    "scienceqa": _write_scienceqa,
    "textvqa": _write_textvqa,
    "pope": _write_pope,
    "mmbench": _write_mmbench,
}


def _tested(rng: random.Random, letters: float = 0.2) -> Scene:
    return make_scene(rng, for_testing=True, letters=letters)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: Any) -> None:
    _write(path, (json.dumps(value, indent=1) + "\n").encode("utf-8"))


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8"))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
