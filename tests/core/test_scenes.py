"""The world of pictures: its files, its split, the truth and balance of its answers, and the tiny model beside it."""

import base64
import csv
import io
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

from dora_core.testing import scene_files, scene_texts, scenes
from dora_core.testing.scenes import COLOURS, PICTURE, SHAPES, Scene
from dora_core.testing.tiny_llava import save_tiny_llava

NUM_QUESTIONS = 60
SIZES = {"num_captions": 80, "num_conversations": 160, "num_questions": NUM_QUESTIONS}
CELLS = {"top left": {0}, "top right": {1}, "bottom left": {2}, "bottom right": {3}}
CELLS |= {"top": {0, 1}, "bottom": {2, 3}, "left": {0, 2}, "right": {1, 3}}


class Asked(NamedTuple):
    question: str
    answer: str
    picture: bytes | None
    options: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    scene_files.write_scenes(folder, seed=0, **SIZES)
    return folder


def read(path: Path, lines: bool = False) -> Any:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)


def questions(world: Path, benchmark: str) -> Iterator[Asked]:
    folder = world / "eval" / benchmark
    if benchmark == "vqav2":
        answers = {
            row["question_id"]: row for row in read(folder / "v2_mscoco_val2014_annotations.json")["annotations"]
        }
        for row in read(folder / "v2_OpenEnded_mscoco_val2014_questions.json")["questions"]:
            image = (folder / "val2014" / f"COCO_val2014_{row['image_id']:012d}.jpg").read_bytes()
            yield Asked(row["question"], agreed(answers[row["question_id"]]["answers"]), image)
    elif benchmark == "gqa":
        for row in read(folder / "testdev_balanced_questions.json").values():
            image = (folder / "data" / "images" / f"{row['imageId']}.jpg").read_bytes()
            yield Asked(row["question"], row["answer"], image)
    elif benchmark == "vizwiz":
        for row in read(folder / "val.json"):
            yield Asked(row["question"], agreed(row["answers"]), (folder / "val" / row["image"]).read_bytes())
    elif benchmark == "scienceqa":
        problems = read(folder / "problems.json")
        for pid in read(folder / "pid_splits.json")["test"]:
            row = problems[pid]
            image = row["image"] and (folder / "images" / "test" / pid / row["image"]).read_bytes()
            yield Asked(row["question"], row["choices"][row["answer"]], image, tuple(row["choices"]))
    elif benchmark == "textvqa":
        prompts = {row["question_id"]: row for row in read(folder / "llava_textvqa_val_v051_ocr.jsonl", lines=True)}
        for row in read(folder / "TextVQA_0.5.1_val.json")["data"]:
            question, seen, form = prompts[row["image_id"]]["text"].split("\n")
            assert (question, form) == (row["question"], scene_texts.SHORT)
            image = (folder / "train_images" / prompts[row["image_id"]]["image"]).read_bytes()
            answer = agreed([{"answer": text} for text in row["answers"]]).upper()
            yield Asked(question, answer, image, tuple(seen.removeprefix("Reference OCR token: ").split(", ")))
    elif benchmark == "pope":
        for category in ("random", "popular", "adversarial"):
            for row in read(folder / "coco" / f"coco_pope_{category}.json", lines=True):
                yield Asked(row["text"], row["label"], (folder / "val2014" / row["image"]).read_bytes())
    else:
        text = (folder / "mmbench_dev_20230712.tsv").read_text(encoding="utf-8")
        for row in csv.DictReader(io.StringIO(text), delimiter="\t"):
            options = tuple(row[letter] for letter in "ABCD" if row.get(letter))
            yield Asked(row["question"], row[row["answer"]], base64.b64decode(row["image"]), options)


def agreed(answers: list[dict[str, Any]]) -> str:
    assert len(answers) == 10
    answer, votes = Counter(row["answer"] for row in answers).most_common(1)[0]
    assert votes >= 9
    return answer


def mask(picture: Image.Image) -> torch.Tensor:
    return torch.tensor(list(picture.convert("RGB").tobytes())).view(PICTURE, PICTURE, 3).amax(2) > 120


def cell_of(bright: torch.Tensor, cell: int) -> torch.Tensor:
    row, column = divmod(cell, 2)
    return bright[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]


@cache
def patterns() -> list[tuple[str, torch.Tensor]]:
    """Return how every shape may look in a cell, at both sizes and, by many draws, at every place in it."""
    ways = [(shape, size, seed) for shape in SHAPES for size in scenes.SIZES for seed in range(40)]
    jpegs = [scenes.draw(Scene(shape, "white", size, (0,)), random.Random(seed)) for shape, size, seed in ways]
    masks = [mask(Image.open(io.BytesIO(jpeg))) for jpeg in jpegs]
    return [(way[0], cell_of(bright, 0)) for way, bright in zip(ways, masks, strict=True)]


@cache
def seen(picture: bytes) -> dict[str, Any]:
    """Measure colour, number, size, cells and shape in the pixels."""
    image = Image.open(io.BytesIO(picture))
    assert (image.format, image.size) == ("JPEG", (PICTURE, PICTURE))
    bright = mask(image)
    pixels = torch.tensor(list(image.convert("RGB").tobytes())).view(PICTURE, PICTURE, 3)[bright].float()
    cells = {cell for cell in range(4) if cell_of(bright, cell).sum() > 16}  # strokes may reach over by a pixel
    one = cell_of(bright, min(cells))
    width = one.any(0).nonzero().flatten()
    away = {name: (pixels.median(0).values - torch.tensor(rgb)).norm().item() for name, rgb in COLOURS.items()}
    shape = min(patterns(), key=lambda pattern: (pattern[1] ^ one).sum().item())[0]
    size = "big" if width.max() - width.min() > 10 else "small"
    colour = min(away, key=away.get)
    return {"colour": colour, "number": str(len(cells)), "size": size, "cells": cells, "shape": shape}


def is_true(asked: Asked) -> bool:
    """Whether an answer is what the pixels say."""
    found = seen(asked.picture)
    if match := re.fullmatch(r"Is it (\w+)\?", asked.question):
        return asked.answer == ("yes" if found["colour"] == match[1] else "no")
    if match := re.fullmatch(r"Is there a (\w+) in the image\?", asked.question):
        return asked.answer == ("yes" if found["shape"] == match[1] else "no")
    if match := re.fullmatch(r"What colour is the (\w+)\?", asked.question):
        return asked.answer == (found["colour"] if found["shape"] == match[1] else "unanswerable")
    if asked.answer in CELLS:
        return found["cells"] == CELLS[asked.answer]
    return asked.answer in (found["colour"], found["number"], found["size"], found["shape"])


def blind_level(asked: list[Asked]) -> float:
    """Return the accuracy of the best answer to each wording, or of choosing among the options at random."""
    score, by_wording = 0.0, defaultdict(Counter)
    for one in asked:
        wording = re.sub(r"\b(" + "|".join((*COLOURS, *SHAPES)) + r")\b", "…", one.question)
        if one.options:
            score += 1 / len(one.options)
        else:
            by_wording[wording][one.answer] += 1
    return (score + sum(max(answers.values()) for answers in by_wording.values())) / len(asked)


@pytest.mark.parametrize("benchmark", scene_files.BENCHMARKS)
def test_every_answer_is_what_the_pixels_show(world: Path, benchmark: str) -> None:
    asked = [one for one in questions(world, benchmark) if one.picture]
    assert len(asked) >= NUM_QUESTIONS // 2
    assert [one for one in asked if not is_true(one)] == []


def test_the_right_option_is_among_the_options_once(world: Path) -> None:
    for benchmark in ("scienceqa", "textvqa", "mmbench"):
        for one in questions(world, benchmark):
            assert one.options.count(one.answer) == 1
            assert len(set(one.options)) == len(one.options) >= 2


def test_an_answer_that_ignores_the_picture_is_seldom_right(world: Path) -> None:
    levels = {
        name: blind_level([one for one in questions(world, name) if one.picture]) for name in scene_files.BENCHMARKS
    }
    assert max(levels.values()) < 0.7, levels
    assert sum(levels.values()) / len(levels) < 0.5, levels


def test_some_questions_cannot_be_answered_and_some_need_no_picture(world: Path) -> None:
    assert 0.1 < sum(one.answer == "unanswerable" for one in questions(world, "vizwiz")) / NUM_QUESTIONS < 0.5
    assert 0 < sum(one.picture is None for one in questions(world, "scienceqa")) < NUM_QUESTIONS / 2


def test_no_tested_picture_shows_what_a_training_picture_shows(world: Path) -> None:
    def scene(picture: bytes) -> Scene:
        found = seen(picture)
        return Scene(found["shape"], found["colour"], found["size"], tuple(sorted(found["cells"])))

    trained = {scene(path.read_bytes()) for path in (world / "images").glob("*.jpg")}
    tested = {scene(one.picture) for name in scene_files.BENCHMARKS for one in questions(world, name) if one.picture}
    assert min(len(trained), len(tested)) > 50
    assert not trained & tested
    for attribute in ("shape", "colour", "size", "number"):
        assert {one.value(attribute) for one in trained} == {one.value(attribute) for one in tested}


def test_rows_are_conversations_in_llava_s_layout(world: Path) -> None:
    captions, talks = read(world / "captions.json"), read(world / "instructions.json")
    assert (len(captions), len(talks)) == (SIZES["num_captions"], SIZES["num_conversations"])
    assert 0 < sum("image" not in row for row in talks) < len(talks) / 4
    for row in captions + talks:
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert [turn["value"].count("<image>") for turn in turns] == [int("image" in row), *[0] * (len(turns) - 1)]
        assert "image" not in row or (world / "images" / row["image"]).is_file()
    assert {row["conversations"][0]["value"] for row in captions} == {"<image>"}
    asked = [turn["value"] for row in talks for turn in row["conversations"][::2]]
    assert all(text.endswith((f"\n{scene_texts.SHORT}", f"\n{scene_texts.LETTER}")) for text in asked)


def test_captions_answer_no_question_in_a_benchmark_s_form(world: Path) -> None:
    said = " ".join(row["conversations"][1]["value"] for row in read(world / "captions.json"))
    forms = (scene_texts.SHORT, scene_texts.LETTER, scene_texts.INSUFFICIENT, "USER", "What", "unanswerable")
    assert [form for form in forms if form in said] == []


def test_the_seed_decides_every_file(world: Path, tmp_path: Path) -> None:
    folders = [world, tmp_path / "same", tmp_path / "other"]
    for folder, seed in zip(folders[1:], (0, 1), strict=True):
        scene_files.write_scenes(folder, seed=seed, **SIZES)
    files = [{file.relative_to(top): file.read_bytes() for file in top.rglob("*.*")} for top in folders]
    assert files[0] == files[1] != files[2]


def test_a_tiny_llava_loads_looks_at_its_picture_and_depends_on_the_seed_alone(world: Path, tmp_path: Path) -> None:
    texts = scene_files.caption_texts(world)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = {
        name: save_tiny_llava(tmp_path / name, texts, phrases=scene_texts.PHRASES, seed=seed).state_dict()
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    }
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(made["same"][key], value) for key, value in made["one"].items())
    assert any(not torch.equal(made["other"][key], value) for key, value in made["one"].items())

    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "one").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "one")
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert all(len(tokenizer.tokenize(phrase)) == 1 for phrase in scene_texts.PHRASES)
    text, logits = "<image>" * model.config.image_seq_length + "\nWhat colour is it? ASSISTANT:", []
    for path in sorted((world / "images").glob("caption-*.jpg"))[:2]:
        pixels = processor(images=Image.open(path), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, PICTURE, PICTURE)
        with torch.no_grad():
            logits.append(model(**tokenizer(text, return_tensors="pt"), pixel_values=pixels).logits[0, -1])
    assert logits[0].isfinite().all()
    assert not torch.allclose(*logits)
