"""Write the world of clips: videos, subtitles and annotations of TVQA, How2QA, TVC and YC2C in the files of VALUE."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from dora_core.testing import clip_texts as texts
from dora_core.testing.clips import BEAT_S, NUM_BEATS, SOURCES, SPLITS, Clip, clip_name, named_clip, render

SHARES = {"tv": 2, "how2": 2, "yc2": 1}
"""Clips of each source, of five."""
FPS = 2
FRAMES_PER_BEAT = round(FPS * BEAT_S)
DURATION_S = NUM_BEATS * BEAT_S
NUM_REFERENCES = {"train": 2, "val": texts.NUM_CAPTIONS, "test": texts.NUM_CAPTIONS}
"""Captions of a clip in TVC."""
SPOKEN_OF = 0.5
"""Share of clips that are asked about what is said."""

ANNOTATIONS = {
    "tvqa": {"train": "tvqa_train", "val": "tvqa_val", "test": "tvqa_test_public"},
    "how2qa": {"train": "how2qa_train_release", "val": "how2qa_val_release", "test": "how2qa_test_public_release"},
    "tvc": {split: f"tvc_{split}_release" for split in SPLITS},
    "yc2c": {split: f"yc2c_{split}_release" for split in SPLITS},
}
"""Names of files without ``.jsonl``, by task and split."""

# One key frame: the rest of a clip is hardly more than its moves. Little is lost: colours must survive.
_ENCODER = {"preset": "ultrafast", "tune": "zerolatency", "crf": "6", "g": str(NUM_BEATS * FRAMES_PER_BEAT)}

Row = dict[str, Any]


def write_clips(
    folder: str | Path,
    seed: int = 0,
    num_clips: int = 1200,
    num_tested: int = 200,
    *,
    shuffle_choices: bool = False,
) -> None:
    """Write ``video/ann`` and ``video/videos`` below a folder, as VL-Adapter's ``datasets`` has them.

    ``num_clips`` are for training and ``num_tested`` for each of val and test, over all sources by ``SHARES``; no clip
    of val or test is one to train on. Questions of val and test have answers, and ``show_name`` holds the kind of a
    question. Choices stand in the same order in every row unless they are shuffled, which is harder to learn. Raises
    ValueError for numbers that ``SHARES`` does not divide.
    """
    whole = sum(SHARES.values())
    for name, number in {"num_clips": num_clips, "num_tested": num_tested}.items():
        if number < whole or number % whole:
            raise ValueError(f"{name}={number} was given; a multiple of {whole} above 0 is allowed; change it")
    video = Path(folder) / "video"
    lines: dict[str, list[Row]] = {source: [] for source in SOURCES}
    rows: dict[tuple[str, str], list[Row]] = {}
    for split in SPLITS:
        for source, share in SHARES.items():
            (video / "videos" / source).mkdir(parents=True, exist_ok=True)
            asked, described = [], []
            for number in range((num_clips if split == "train" else num_tested) * share // whole):
                name = clip_name(source, split, number)
                clip, rng = named_clip(name, seed), random.Random(f"{seed}/{name}/texts")
                encode(render(clip), video / "videos" / source / f"{name}.mp4")
                spoken = texts.draw_spoken(rng)
                lines[source].append({"vid_name": name, "sub": texts.subtitles(spoken, rng)})
                asked += _questions(source, name, clip, spoken, rng, shuffle_choices)
                described.append((name, clip))
            if source in texts.TASKS:
                rows[texts.TASKS[source], split] = asked
            if source == "tv":
                rows["tvc", split] = _tvc_rows(described, NUM_REFERENCES[split], random.Random(f"{seed}/tvc/{split}"))
            elif source == "yc2":
                rows["yc2c", split] = [_described(name, texts.captions(clip)[:1]) for name, clip in described]
    _number(rows)
    for (task, split), own in rows.items():
        _write_lines(video / "ann" / task / f"{ANNOTATIONS[task][split]}.jsonl", own)
    for source, own in lines.items():
        _write_lines(video / "ann" / f"{source}_subtitles.jsonl", own)


def clip_texts(folder: str | Path) -> Iterator[str]:
    """Yield what is written in the training rows and in the subtitles of ``write_clips``, to train a tokenizer."""
    annotations = Path(folder) / "video" / "ann"
    for source in SOURCES:
        for row in read_lines(annotations / f"{source}_subtitles.jsonl"):
            yield " ".join(line["text"] for line in row["sub"])
    for task in ANNOTATIONS:
        for row in read_rows(folder, task, "train"):
            if "q" in row:
                choices = (f" a{place}: {text}." for place, text in enumerate(choices_of(row)))
                yield row["q"] + "".join(choices) + f" a{row['answer_idx']}"
            yield from (description["desc"] for description in row.get("descs", ()))


def read_rows(folder: str | Path, task: str, *splits: str) -> list[Row]:
    """Return the rows of a task of ``ANNOTATIONS`` in a folder of ``write_clips``, of some splits or of all."""
    names = (ANNOTATIONS[task][split] for split in splits or SPLITS)
    return [row for name in names for row in read_lines(Path(folder) / "video" / "ann" / task / f"{name}.jsonl")]


def choices_of(row: Row) -> list[str]:
    """Return the four or five choices of a question row."""
    return [row[f"a{place}"] for place in range(5) if f"a{place}" in row]


def read_lines(path: str | Path) -> list[Row]:
    """Read a file of one JSON object a line."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def encode(pictures: np.ndarray, path: str | Path) -> None:
    """Write the pictures of the beats, uint8 ``[NUM_BEATS, H, W, 3]``, as an MP4 of ``FPS`` frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=_ENCODER)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for beat, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            for number in range(FRAMES_PER_BEAT):
                frame.pts = beat * FRAMES_PER_BEAT + number
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def decode(path: str | Path) -> np.ndarray:
    """Return all frames of a video in RGB, uint8 ``[num_frames, H, W, 3]``."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _questions(
    source: str, name: str, clip: Clip, spoken: texts.Spoken, rng: random.Random, shuffle_choices: bool
) -> list[Row]:
    kinds = texts.KINDS if rng.random() < SPOKEN_OF else ("motion", "still")
    rows = []
    for one in texts.questions(source, clip, spoken):
        if one.kind not in kinds:
            continue
        choices = rng.sample(one.choices, len(one.choices)) if shuffle_choices else list(one.choices)
        row = {"q": one.text, **{f"a{place}": text for place, text in enumerate(choices)}}
        row |= {"answer_idx": choices.index(one.answer), "show_name": one.kind, "ts": texts.MOMENT, "vid_name": name}
        rows.append(row)
    return rows


def _described(name: str, descriptions: Iterable[str]) -> Row:
    return {"vid_name": name, "duration": DURATION_S, "descs": [{"desc": text} for text in descriptions]}


def _tvc_rows(clips: Iterable[tuple[str, Clip]], number: int, rng: random.Random) -> list[Row]:
    rows = []
    for name, clip in clips:
        row = _described(name, rng.sample(texts.captions(clip), number)) | {"ts": [0.0, DURATION_S]}
        for description in row["descs"]:
            description |= {"type": "v", "from_retrieval": False}
        rows.append(row)
    return rows


def _number(rows: dict[tuple[str, str], list[Row]]) -> None:
    """Give questions, clips and descriptions numbers that no other of their task has."""
    for task in ANNOTATIONS:
        own = [row for (of, _), some in rows.items() if of == task for row in some]
        for number, row in enumerate(own):
            row["qid" if "q" in row else "clip_id"] = number
        for number, description in enumerate(description for row in own for description in row.get("descs", ())):
            description["desc_id"] = number


def _write_lines(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
