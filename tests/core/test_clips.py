"""The world of clips and the image-text tasks beside it: files, split, truth in the pixels, the worth of a guess."""

import json
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from dora_core.testing import clip_files, clip_texts, clips, picture_tasks, scenes
from dora_core.testing.clip_files import choices_of, read_lines, read_rows, write_clips
from dora_core.testing.clips import COLOURS, NUM_BEATS, PICTURE, Clip, Seen, Thing

SIZES = {"num_clips": 90, "num_tested": 45}
SOURCE_OF = {"tvqa": "tv", "how2qa": "how2", "tvc": "tv", "yc2c": "yc2"}
QUESTIONS = ("tvqa", "how2qa")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_clips(folder, seed=0, **SIZES)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    picture_tasks.write_picture_tasks(folder, seed=0, num_pictures=60, num_tested=30)
    return folder


def subtitles(world: Path) -> dict[str, list[dict[str, Any]]]:
    files = (world / "video" / "ann" / f"{source}_subtitles.jsonl" for source in clips.SOURCES)
    return {row["vid_name"]: row["sub"] for file in files for row in read_lines(file)}


def videos(world: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted((world / "video" / "videos").rglob("*.mp4"))}


decoded = cache(clip_files.decode)


@cache
def measured(path: Path) -> Clip:
    """Return the clip that the decoded frames show; what happens in it is told from places alone."""
    beats = [clips.recognize(frame) for frame in decoded(path)[:: clip_files.FRAMES_PER_BEAT]]
    if len(beats[0]) == 1:
        thing = made_of([seen for (seen,) in beats])
        first, middle, last = (thing.places[beat] for beat in (0, NUM_BEATS // 2, -1))
        far = last if last != first else middle
        step = tuple(np.sign(np.subtract(far, first)).tolist())
        way = next((name for name, to in clips.WAYS.items() if to == step), "")
        return Clip((thing,), "stays" if far == first else "goes" if far == last else "turns", way)
    one, other = (made_of([seen for both in beats for seen in both if seen.colour == of.colour]) for of in beats[0])
    apart = [there[0] - here[0] for here, there in zip(one.places, other.places, strict=True)]
    moved = one.places[-1][0] - one.places[0][0]
    deed = "pass" if apart[-1] < 0 else "bounce" if min(apart) < apart[0] else "go left" if moved < 0 else "go right"
    return Clip((one, other), deed)


def made_of(seen: list[Seen]) -> Thing:
    assert len(seen) == NUM_BEATS and len({one.shape for one in seen}) == 1
    return Thing(seen[0].shape, tuple(one.colour for one in seen), tuple((one.column, one.row) for one in seen))


def test_every_answer_is_what_the_decoded_frames_or_the_subtitles_say(world: Path) -> None:
    said, files = subtitles(world), videos(world)
    for task in QUESTIONS:
        rows = read_rows(world, task)
        for row in rows:
            heard = " ".join(line["text"] for line in said[row["vid_name"]])
            spoken = {"food": re.search(r"Ann: I like (\w+)", heard)[1], "pet": re.search(r"I have a (\w+)", heard)[1]}
            asked = clip_texts.questions(SOURCE_OF[task], measured(files[row["vid_name"]]), spoken)
            expected = (row["show_name"], row["q"], tuple(choices_of(row)), row[f"a{row['answer_idx']}"])
            assert expected in asked, row
        assert {row["q"] for row in rows} == {one.text for one in clip_texts.WORDINGS[SOURCE_OF[task]]}


def test_every_caption_says_what_the_decoded_frames_show(world: Path) -> None:
    files = videos(world)
    for task in ("tvc", "yc2c"):
        for row in read_rows(world, task):
            clip = measured(files[row["vid_name"]])
            for text in (one["desc"] for one in row["descs"]):
                first, last = clip.things[0].colours[0], clip.things[0].colours[-1]
                assert text in clip_texts.captions(clip)
                assert all(word in text for word in (first, last, clip.way, *(thing.shape for thing in clip.things)))


def test_videos_have_more_frames_than_are_sampled_and_nothing_changes_within_a_beat(world: Path) -> None:
    files = [*videos(world).values()]
    assert len(files) == SIZES["num_clips"] + 2 * SIZES["num_tested"]
    for path in files[::8]:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (float(stream.average_rate), container.duration) == (clip_files.FPS, 12_000_000)
        frames = decoded(path).astype(int)
        assert frames.shape == (24, PICTURE, PICTURE, 3)
        beats = frames.reshape(NUM_BEATS, clip_files.FRAMES_PER_BEAT, -1)
        assert abs(beats - beats[:, :1]).max() < 40


def test_colours_and_places_survive_in_sixteen_by_sixteen_pixels(world: Path) -> None:
    colours = np.array([*COLOURS.values()]) / np.linalg.norm([*COLOURS.values()], axis=1, keepdims=True)
    for name, path in videos(world).items():
        for frame, seen in zip(decoded(path)[::3], map(measured(path).seen, range(NUM_BEATS)), strict=True):
            small = frame.reshape(16, 3, 16, 3, 3).mean((1, 3))
            for one in seen:
                mean = small[2 * one.row :, 2 * one.column :][:4, :4].mean((0, 1))
                alike = colours @ mean / np.linalg.norm(mean)
                assert [*COLOURS][int(alike.argmax())] == one.colour and np.sort(alike)[-2] < 0.97, name


def test_no_tested_clip_is_one_to_train_on(world: Path) -> None:
    files = videos(world)
    assert all(clips.named_clip(name) == measured(path) for name, path in files.items())
    trained, tested = (
        {measured(path).things for name, path in files.items() if ("_train_" in name) == wanted}
        for wanted in (True, False)
    )
    assert min(len(trained), len(tested)) > 60 and not trained & tested
    for attribute in ("shape", "colours", "places"):
        shown = [{getattr(thing, attribute)[0] for things in some for thing in things} for some in (trained, tested)]
        assert len(shown[0] & shown[1]) > 0.7 * len(shown[0])


def test_motion_needs_more_than_the_answers_frequency_or_one_frame() -> None:
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in clip_texts.KINDS}
    for name in (clips.clip_name(source, "test", number) for source in ("tv", "how2") for number in range(1080)):
        spoken = clip_texts.draw_spoken(random.Random(name))
        for kind, text, choices, answer in clip_texts.questions(name.split("_")[0], clips.named_clip(name), spoken):
            values = {f"a{place}": choice for place, choice in enumerate(choices)}
            rows[kind].append({"q": text, **values, "answer_idx": choices.index(answer), "vid_name": name})
    assert max(clip_texts.blind_level(own) for own in rows.values()) < 0.3
    one_frame = {kind: clip_texts.one_frame_level(own) for kind, own in rows.items()}
    assert one_frame["motion"] < 0.42 and one_frame["still"] > 0.99 and one_frame["speech"] < 0.3, one_frame
    for wording in {row["q"] for row in rows["motion"]}:
        own = [row for row in rows["motion"] if row["q"] == wording]
        assert clip_texts.blind_level(own) < 0.28 and clip_texts.one_frame_level(own) < 0.45, wording


def test_the_answers_to_motion_questions_are_as_frequent(world: Path) -> None:
    for task in QUESTIONS:
        for wording in (one for one in clip_texts.WORDINGS[SOURCE_OF[task]] if one.kind == "motion"):
            answers = Counter(row["answer_idx"] for row in read_rows(world, task, "train") if row["q"] == wording.text)
            assert set(answers) == set(range(len(wording.choices)))
            assert max(answers.values()) - min(answers.values()) <= 1


def test_subtitles_are_in_order_and_hold_no_answer_of_another_kind(world: Path) -> None:
    wordings = [one for asked in clip_texts.WORDINGS.values() for one in asked if one.kind != "speech"]
    banned = {word for one in wordings for choice in one.choices for word in choice.split()}
    for lines in subtitles(world).values():
        times = [line[key] for line in lines for key in ("start", "end")]
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= clip_files.DURATION_S
        assert not banned & set(re.findall(r"\w+", " ".join(line["text"] for line in lines).lower()))


def test_rows_have_the_fields_of_value_and_numbers_of_their_own(world: Path) -> None:
    shared = ["answer_idx", "q", "qid", "show_name", "ts", "vid_name"]
    fields = {"tvqa": ["a0", "a1", "a2", "a3", "a4", *shared], "how2qa": ["a0", "a1", "a2", "a3", *shared]}
    fields["yc2c"] = ["clip_id", "descs", "duration", "vid_name"]
    fields["tvc"] = [*fields["yc2c"], "ts"]
    for task, expected in fields.items():
        rows = read_rows(world, task)
        assert all(sorted(row) == sorted(expected) for row in rows)
        assert len({row["qid" if task in QUESTIONS else "clip_id"] for row in rows}) == len(rows)
        assert {row["vid_name"] for row in rows} <= set(videos(world))
        if task in QUESTIONS:
            assert {row["ts"] for row in rows} == {"0.00-12.00"}
            continue
        inner = ["desc", "desc_id", *(["from_retrieval", "type"] if task == "tvc" else [])]
        described = [one for row in rows for one in row["descs"]]
        assert all(sorted(one) == inner for one in described)
        assert len({one["desc_id"] for one in described}) == len(described)
        for split, number in clip_files.NUM_REFERENCES.items():
            texts = [{one["desc"] for one in row["descs"]} for row in read_rows(world, task, split)]
            assert {len(own) for own in texts} == {number if task == "tvc" else 1}
    assert all(row["ts"] == [0.0, 12.0] for row in read_rows(world, "tvc"))


def test_the_seed_decides_every_file_and_choices_can_be_shuffled(tmp_path: Path) -> None:
    for name, seed in (("0", 0), ("1", 0), ("2", 1), ("3", 0)):
        write_clips(tmp_path / name, seed, 15, 10, shuffle_choices=name == "3")
        picture_tasks.write_picture_tasks(tmp_path / name, seed, 4, 4)
    made = [
        {path.relative_to(top): path.read_bytes() for path in top.rglob("*.*")} for top in sorted(tmp_path.iterdir())
    ]
    assert made[0] == made[1] != made[2]
    assert {str(path.parent.name) for path, content in made[0].items() if made[3][path] != content} == {*QUESTIONS}
    plain, shuffled = (read_rows(tmp_path / name, "tvqa") for name in "03")
    assert [row[f"a{row['answer_idx']}"] for row in plain] == [row[f"a{row['answer_idx']}"] for row in shuffled]
    assert len({tuple(choices_of(row)) for row in shuffled}) > 5


def test_a_number_that_cannot_be_shared_out_and_a_name_of_no_clip_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_clips=12 was given; a multiple of 5 above 0 is allowed; change it"):
        write_clips(tmp_path, num_clips=12)
    with pytest.raises(ValueError, match=r"name='tv_7' was given; .*; take a name"):
        clips.named_clip("tv_7")


def look(path: Path) -> tuple[str, str]:
    """Return colour and number of the things in a picture."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(float)
    bright = pixels.max(2) > 120
    away = {name: np.linalg.norm(np.median(pixels[bright], 0) - rgb) for name, rgb in scenes.COLOURS.items()}
    return min(away, key=away.get), str((bright.reshape(2, 16, 2, 16).sum((1, 3)) > 16).sum())


def test_the_image_text_tasks_are_true_of_their_pictures_and_in_the_files_of_vl_adapter(pictures: Path) -> None:
    def rows(name: str) -> Any:
        return json.loads((pictures / f"{name}.json").read_text())

    official = {row["question_id"]: row for row in rows("vqa/v2_mscoco_val2014_annotations")["annotations"]}
    files = {f"vqa/karpathy_{split}": "COCO" for split in ("train", "val", "test")}
    for name, folder in {**files, "GQA/train": "VG", "GQA/valid": "VG", "GQA/testdev": "GQA"}.items():
        for row in rows(name):
            colour, number = look(pictures / "images" / folder / f"{row['img_id']}.png")
            answer = max(row["label"], key=row["label"].get)
            truths = {"colour": colour, "many": number, "number": number}
            truths |= {f"it {other}?": "yes" if other == colour else "no" for other in scenes.COLOURS}
            assert [truth for said, truth in truths.items() if said in row["sent"]] in ([], [answer]), row
            if "val2014" in row["img_id"] and "train" not in name:
                votes = Counter(one["answer"] for one in official[row["question_id"]]["answers"])
                assert row["label"] == {text: min(1, 3 * number / 10) for text, number in votes.items()}
                assert (official[row["question_id"]]["multiple_choice_answer"], votes.total()) == (answer, 10)
    for row in [*rows("nlvr/train"), *rows("nlvr/valid"), *rows("nlvr/test")]:
        fits = [look(pictures / "images" / "nlvr" / f"{row[side]}.png")[0] in row["sent"] for side in ("img0", "img1")]
        truths = {"The left": fits[0], "The right": fits[1], "Both show": all(fits), "At least": any(fits)}
        assert "something" not in row["sent"] or row["label"] == truths[" ".join(row["sent"].split()[:2])]
    shown: dict[bool, set[str]] = {True: set(), False: set()}
    for image in rows("COCO/dataset_coco")["images"]:
        texts = [sentence["raw"] for sentence in image["sentences"]]
        colour = look(pictures / "images" / "COCO" / f"{image['filename'][:-4]}.png")[0]
        assert len(texts) == 5 and all(f" {colour} " in text for text in texts)
        shown[image["split"] in ("val", "test")] |= {texts[0]} if " at the " in texts[0] else set()
    assert len(shown[True]) > 20 and not shown[True] & shown[False]
