"""The eight tasks of the paper's VL-BART; adding one is adding one function here.

Files, prompts, lengths and batch ratios are those of VL-Adapter (image-text) and VALUE (video-text). Importing this
module must stay cheap (no torch): the evaluators do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pipelines.video.task import Annotations, Example, Record, RecordError, task


def _files(pattern: str, train: str = "train", val: str = "val", test: str = "test") -> dict[str, tuple[str, ...]]:
    names = {"train": train, "val": val, "test": test}
    return {split: tuple(pattern.format(name) for name in listed.split()) for split, listed in names.items()}


@task(
    files=_files("vqa/karpathy_{}.json"),
    id_field="question_id",
    max_text_length=20,
    max_target_length=10,
    draws_target=True,
)
def vqa(record: Record, annotations: Annotations) -> Example:
    """VQAv2 in Karpathy's split: an answer is drawn in proportion to its score, and its loss weighed by it."""
    return Example(
        id=record["question_id"],
        visuals=(f"COCO/{record['img_id']}",),
        before="vqa: ",
        cuttable=record["sent"],
        targets=tuple(record.get("label", {}).items()),
    )


@task(
    files=_files("GQA/{}.json", train="train valid", val="testdev", test="testdev"),
    id_field="question_id",
    max_text_length=20,
    max_target_length=None,
    batch_ratio=100 / 60,
    draws_target=True,
)
def gqa(record: Record, annotations: Annotations) -> Example:
    """GQA balanced. The prompt's spelling is the reference's: released weights know no other."""
    collection = "VG" if annotations.split == "train" else "GQA"
    return Example(
        id=record["question_id"],
        visuals=(f"{collection}/{record['img_id']}",),
        before="gpa: ",
        cuttable=record["sent"],
        targets=tuple(record.get("label", {}).items()),
    )


@task(
    files=_files("nlvr/{}.json", val="valid"),
    id_field="uid",
    max_text_length=None,
    max_target_length=None,
    batch_ratio=20 / 60,
)
def nlvr2(record: Record, annotations: Annotations) -> Example:
    """NLVR2: whether a statement is true of two pictures."""
    label = record.get("label")
    if label not in (0, 1, None):
        raise RecordError(f"nlvr2: the label of {record['uid']} is {label!r}; it must be 0 or 1. Correct nlvr/*.json.")
    return Example(
        id=record["uid"],
        visuals=(f"nlvr/{record['img0']}", f"nlvr/{record['img1']}"),
        before="nlvr: ",
        cuttable=record["sent"],
        targets=() if label is None else (("true" if label else "false", 1.0),),
    )


def _karpathy_images(path: Path, split: str) -> Iterator[Record]:
    wanted = ("train", "restval") if split == "train" else (split,)
    content = json.loads(path.read_text(encoding="utf-8"))
    return (image for image in content["images"] if image["split"] in wanted)


@task(
    files=_files("COCO/dataset_coco.json"),
    records=_karpathy_images,
    id_field="cocoid",
    max_text_length=40,
    max_target_length=40,
    batch_ratio=50 / 60,
    loss_per="token",
)
def caption(record: Record, annotations: Annotations) -> Example:
    """COCO captions in Karpathy's split; each of a picture's five is a training row."""
    return Example(
        id=record["cocoid"],
        visuals=(f"COCO/{Path(record['filename']).stem}",),
        before="caption: ",
        targets=tuple((sentence["raw"].strip(), 1.0) for sentence in record["sentences"]),
    )


# ------------------------------------------------------------------------------------------------ video and text


def _question(record: Record, annotations: Annotations, collection: str, num_choices: int, tag: str) -> Example:
    texts = [record[f"a{number}"].strip(" .") for number in range(num_choices)]
    choices = " ".join(f"a{number}: {text}." for number, text in enumerate(texts))
    answer = record.get("answer_idx")
    if answer is not None and answer not in range(num_choices):
        raise RecordError(f"{tag}: answer_idx of {record['qid']} is {answer!r}; it must be 0 to {num_choices - 1}.")
    return Example(
        id=record["qid"],
        visuals=(f"{collection}/{record['vid_name']}",),
        before="[Subs] ",
        cuttable=annotations.subtitles.get(record["vid_name"], ""),
        after=f" [Q] {record['q']} [TS] ({record['ts']}) [Choices] {choices} {tag}: ",
        targets=() if answer is None else ((f"a{answer}", 1.0),),
    )


@task(
    files=_files("video/ann/tvqa/tvqa_{}.jsonl", test="test_public"),
    subtitles="video/ann/tv_subtitles.jsonl",
    id_field="qid",
    max_text_length=600,
    max_target_length=20,
)
def tvqa(record: Record, annotations: Annotations) -> Example:
    """TVQA: a question on a clip of a television show, five choices."""
    return _question(record, annotations, "tv", 5, "tvqa")


@task(
    files=_files(
        "video/ann/how2qa/how2qa_{}.jsonl", train="train_release", val="val_release", test="test_public_release"
    ),
    subtitles="video/ann/how2_subtitles.jsonl",
    id_field="qid",
    max_text_length=600,
    max_target_length=20,
)
def how2qa(record: Record, annotations: Annotations) -> Example:
    """How2QA: a question on a clip of an instructional video, four choices."""
    return _question(record, annotations, "how2", 4, "how2qa")


def _descriptions(record: Record) -> tuple[tuple[str, float], ...]:
    return tuple((each["desc"].strip(), 1.0) for each in record.get("descs", ()))


@task(
    files=_files("video/ann/tvc/tvc_{}_release.jsonl"),
    subtitles="video/ann/tv_subtitles.jsonl",
    id_field="clip_id",
    max_text_length=600,
    max_target_length=20,
    loss_per="token",
)
def tvc(record: Record, annotations: Annotations) -> Example:
    """TVC: describe a moment of a television show. The time stamp stands as a Python list, as in the reference."""
    return Example(
        id=record["clip_id"],
        visuals=(f"tv/{record['vid_name']}",),
        before="[Subs] ",
        cuttable=annotations.subtitles.get(record["vid_name"], ""),
        after=f" [TS] ({record['ts']}) tvc: ",
        targets=_descriptions(record),
    )


@task(
    files=_files("video/ann/yc2c/yc2c_{}_release.jsonl"),
    subtitles="video/ann/yc2_subtitles.jsonl",
    id_field="clip_id",
    max_text_length=600,
    max_target_length=20,
    loss_per="token",
)
def yc2c(record: Record, annotations: Annotations) -> Example:
    """YouCook2 captions: describe one step of a recipe."""
    return Example(
        id=record["clip_id"],
        visuals=(f"yc2/{record['vid_name']}",),
        before="[Subs] ",
        cuttable=annotations.subtitles.get(record["vid_name"], ""),
        after=" yc2c: ",
        targets=_descriptions(record),
    )
