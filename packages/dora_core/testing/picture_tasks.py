"""Write four image-text tasks on the world of pictures: VQAv2, GQA, NLVR2 and COCO captions in VL-Adapter's files."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from dora_core.testing.scene_texts import attribute_question, open_question
from dora_core.testing.scenes import COLOURS, FIGURES, Scene, draw, make_scene

RESTVAL = 0.25
"""Share of COCO's training pictures that Karpathy took from its validation pictures."""
SLIPS = 0.25
"""Share of VQAv2's questions on which one of the ten annotators has another answer."""
NUM_QUESTIONS = 3
"""Questions on a picture, in VQAv2 and GQA."""
NUM_SENTENCES = 5
NUM_PAIRS = 2
"""Pairs of pictures with the same statement in NLVR2, which is true of the first half."""
_NUMBERS = {"1": "one", "2": "two", "3": "three", "4": "four"}
_QUESTION_TYPES = {"yes": "yes/no", "no": "yes/no", **dict.fromkeys(_NUMBERS, "number")}

Row = dict[str, Any]
Statement = tuple[str, Callable[[Scene, Scene], bool]]
"""What is said of a left and a right picture, and whether it is true of two."""

PHRASES = ("vqa: ", "gpa: ", "nlvr: ", "caption: ")
"""What prompts begin with; the second has the reference's spelling."""


def write_picture_tasks(folder: str | Path, seed: int = 0, num_pictures: int = 600, num_tested: int = 100) -> None:
    """Write ``vqa``, ``GQA``, ``nlvr``, ``COCO`` and ``images`` below a folder, as VL-Adapter's ``datasets`` has them.

    Each of COCO (which VQAv2 shares), VG and nlvr gets ``num_pictures`` or pairs of pictures for training, and each
    set kept for validation and testing ``num_tested``, of scenes that no training picture shows. ``valid.json`` of
    GQA, on which the reference trains, counts as training. Raises ValueError for a number below 4.
    """
    for name, number in {"num_pictures": num_pictures, "num_tested": num_tested}.items():
        if number < 4:
            raise ValueError(f"{name}={number} was given; 4 or more is allowed; raise it")
    folder = Path(folder)
    _write_coco(folder, random.Random(f"{seed}/coco"), num_pictures, num_tested)
    _write_gqa(folder, random.Random(f"{seed}/gqa"), num_pictures, num_tested)
    _write_nlvr(folder, random.Random(f"{seed}/nlvr"), num_pictures, num_tested)


def picture_texts(folder: str | Path) -> Iterator[str]:
    """Yield what is written in the training rows of ``write_picture_tasks``, to train a tokenizer."""
    folder = Path(folder)
    for row in _read(folder / "vqa" / "karpathy_train.json") + _read(folder / "GQA" / "train.json"):
        yield " ".join((row["sent"], *row["label"]))
    for row in _read(folder / "nlvr" / "train.json"):
        yield f"{row['sent']} {'true' if row['label'] else 'false'}"
    for image in _read(folder / "COCO" / "dataset_coco.json")["images"]:
        if image["split"] in ("train", "restval"):
            yield from (sentence["raw"] for sentence in image["sentences"])


def captions(scene: Scene) -> list[str]:
    """Return ``NUM_SENTENCES`` wordings of what a scene shows."""
    number = _NUMBERS[scene.value("number")]
    thing = scene.shape if number == "one" else f"{scene.shape}es" if scene.shape == "cross" else f"{scene.shape}s"
    whole = f"{number} {scene.size} {scene.colour} {thing}"
    place = f" at the {scene.value('place')}" if "place" in scene.attributes else ""
    return [
        f"{whole}{place}",
        f"a picture of {whole}{place}",
        f"there {'is' if number == 'one' else 'are'} {whole}{place}",
        f"we see {whole}{place}",
        f"{whole} on black{place}",
    ]


def statement(rng: random.Random) -> Statement:
    """Draw a statement about two pictures."""
    attribute = rng.choice(("colour", "shape"))
    value = rng.choice([*COLOURS] if attribute == "colour" else FIGURES)
    said = f"something {value}" if attribute == "colour" else f"a {value}"

    def fits(scene: Scene) -> bool:
        return scene.value(attribute) == value

    return rng.choice(
        (
            (f"The left one shows {said}.", lambda left, right: fits(left)),
            (f"The right one shows {said}.", lambda left, right: fits(right)),
            (f"Both show {said}.", lambda left, right: fits(left) and fits(right)),
            (f"At least one shows {said}.", lambda left, right: fits(left) or fits(right)),
        )
    )


def _scene(rng: random.Random, for_testing: bool) -> Scene:
    return make_scene(rng, for_testing=for_testing, letters=0.0)


def _write_coco(folder: Path, rng: random.Random, num_pictures: int, num_tested: int) -> None:
    """Write the captions and, on the same pictures, the questions."""
    images: list[Row] = []
    asked: dict[str, list[Row]] = {split: [] for split in ("train", "val", "test")}
    annotations: list[Row] = []
    num_restval = round(RESTVAL * num_pictures)
    sizes = {"train": num_pictures - num_restval, "restval": num_restval, "val": num_tested, "test": num_tested}
    for split in (split for split, number in sizes.items() for _ in range(number)):
        scene, number = _scene(rng, split in ("val", "test")), len(images)
        year = "train2014" if split == "train" else "val2014"
        cocoid = 9 + 7 * number
        name = f"COCO_{year}_{cocoid:012d}"
        _draw(folder / "images" / "COCO" / f"{name}.png", scene, rng)
        sentences = [
            {"raw": text, "tokens": text.split(), "sentid": NUM_SENTENCES * number + place, "imgid": number}
            for place, text in enumerate(captions(scene))
        ]
        ids = {"cocoid": cocoid, "imgid": number, "sentids": [sentence["sentid"] for sentence in sentences]}
        images.append({"filename": f"{name}.jpg", "filepath": year, "split": split, **ids, "sentences": sentences})
        for place in range(NUM_QUESTIONS):
            row, annotation = _vqa_row(scene, rng, 1000 * cocoid + place, name, cocoid)
            asked["train" if split == "restval" else split].append(row)
            if split in ("val", "test"):
                annotations.append(annotation)
    _write_json(folder / "COCO" / "dataset_coco.json", {"dataset": "coco", "images": images})
    for split, rows in asked.items():
        _write_json(folder / "vqa" / f"karpathy_{split}.json", rows)
    _write_json(folder / "vqa" / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def _vqa_row(scene: Scene, rng: random.Random, question_id: int, name: str, cocoid: int) -> tuple[Row, Row]:
    """Return a question in Karpathy's form and its annotation in the official one."""
    question, answer = open_question(scene, rng)
    given = [answer] * 10
    if rng.random() < SLIPS:
        given[rng.randrange(10)] = rng.choice([other for other in (*COLOURS, "yes", "no") if other != answer])
    # an answer's score is 0.3 for each who gave it, at most 1
    label = {text: min(1.0, round(0.3 * votes, 1)) for text, votes in Counter(given).most_common()}
    facts = {
        "question_id": question_id,
        "question_type": " ".join(question.lower().rstrip("?").split()[:2]),
        "answer_type": _QUESTION_TYPES.get(answer, "other"),
    }
    answers = [{"answer": text, "answer_confidence": "yes", "answer_id": place} for place, text in enumerate(given, 1)]
    official = {"image_id": cocoid, "multiple_choice_answer": answer, "answers": answers}
    return {**facts, "img_id": name, "sent": question, "label": label}, {**facts, **official}


def _write_gqa(folder: Path, rng: random.Random, num_pictures: int, num_tested: int) -> None:
    number = 0
    for split, num_own in {"train": num_pictures, "valid": num_tested, "testdev": num_tested}.items():
        rows = []
        for _ in range(num_own):
            scene, number = _scene(rng, split == "testdev"), number + 1
            collection, name = ("GQA", f"n{number}") if split == "testdev" else ("VG", str(2_300_000 + number))
            _draw(folder / "images" / collection / f"{name}.png", scene, rng)
            for place in range(NUM_QUESTIONS):
                question, answer = attribute_question(scene, rng)
                identity = f"{number:07d}{place}"
                rows.append({"question_id": identity, "img_id": name, "sent": question, "label": {answer: 1.0}})
        _write_json(folder / "GQA" / f"{split}.json", rows)


def _write_nlvr(folder: Path, rng: random.Random, num_pictures: int, num_tested: int) -> None:
    """Write statements, each with as many pairs of which it is true as of which it is false."""
    for split, num_own in {"train": num_pictures, "valid": num_tested, "test": num_tested}.items():
        rows: list[Row] = []
        prefix = "dev" if split == "valid" else f"{split}1" if split == "test" else split
        for number in range(num_own // NUM_PAIRS):
            said, is_true = statement(rng)
            for pair in range(NUM_PAIRS):
                wanted = pair < NUM_PAIRS // 2
                while True:
                    scenes = [_scene(rng, split != "train") for _ in range(2)]
                    if is_true(*scenes) == wanted:
                        break
                name = f"{prefix}-{number}-{pair}"
                names = {f"img{side}": f"{name}-img{side}" for side in range(2)}
                for image, scene in zip(names.values(), scenes, strict=True):
                    _draw(folder / "images" / "nlvr" / f"{image}.png", scene, rng)
                rows.append({"identifier": f"{name}-0", **names, "sent": said, "label": int(wanted)})
                rows[-1]["uid"] = f"nlvr2_{split}_{len(rows) - 1}"
        _write_json(folder / "nlvr" / f"{split}.json", rows)


def _draw(path: Path, scene: Scene, rng: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(draw(scene, rng))).save(path)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
