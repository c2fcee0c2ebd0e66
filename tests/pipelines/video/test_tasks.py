from __future__ import annotations

import json

import pytest

from dora_core.data.rows import DataError
from dora_core.registry import RegistryError
from pipelines.video import tasks
from pipelines.video.task import TASKS, Annotations, Example, RecordError, get_task, task

SPEECH = Annotations("train", {"clip": "Hi there. Bye."})
QUESTION = {
    "qid": 7,
    "q": "Why does Ann smile?",
    "a0": "She won. ",
    "a1": "Tea.",
    "a2": "No",
    "a3": "It rains..",
    "a4": "Bob",
    "answer_idx": 3,
    "ts": "3.10-5.20",
    "vid_name": "clip",
    "show_name": "Show",
}


def text(example: Example) -> str:
    return example.before + example.cuttable + example.after


def test_video_questions_read_as_the_reference_writes_them():
    example = tasks.tvqa(QUESTION, SPEECH)
    assert text(example) == (
        "[Subs] Hi there. Bye. [Q] Why does Ann smile? [TS] (3.10-5.20) [Choices] a0: She won. a1: Tea. a2: No. "
        "a3: It rains. a4: Bob. tvqa: "
    )
    assert example.cuttable == "Hi there. Bye." and example.visuals == ("tv/clip",)
    assert example.targets == (("a3", 1.0),) and example.id == 7
    four = tasks.how2qa(QUESTION, SPEECH)
    assert text(four).endswith("a2: No. a3: It rains. how2qa: ") and four.visuals == ("how2/clip",)
    hidden = {name: value for name, value in QUESTION.items() if name != "answer_idx"}
    assert tasks.tvqa(hidden, Annotations("test")).targets == ()
    assert text(tasks.tvqa(hidden, Annotations("test"))).startswith("[Subs]  [Q] Why")


def test_video_captions_read_as_the_reference_writes_them():
    record = {
        "vid_name": "clip",
        "clip_id": 4,
        "ts": [3.1, 9.4],
        "descs": [{"desc": "Ann wins."}, {"desc": "She wins"}],
    }
    example = tasks.tvc(record, SPEECH)
    assert text(example) == "[Subs] Hi there. Bye. [TS] ([3.1, 9.4]) tvc: "
    assert example.targets == (("Ann wins.", 1.0), ("She wins", 1.0))
    assert text(tasks.yc2c(record, SPEECH)) == "[Subs] Hi there. Bye. yc2c: "
    assert tasks.yc2c(record, SPEECH).visuals == ("yc2/clip",)


def test_image_tasks_read_as_the_reference_writes_them():
    record = {
        "question_id": 1,
        "img_id": "COCO_train2014_000000000009",
        "sent": "What is it?",
        "label": {"a": 0.3, "b": 1},
    }
    assert text(tasks.vqa(record, SPEECH)) == "vqa: What is it?"
    assert tasks.vqa(record, SPEECH).targets == (("a", 0.3), ("b", 1))
    assert tasks.vqa(record, SPEECH).visuals == ("COCO/COCO_train2014_000000000009",)
    assert text(tasks.gqa(record, SPEECH)) == "gpa: What is it?"
    assert [tasks.gqa(record, Annotations(s)).visuals[0][:3] for s in ("train", "val", "test")] == ["VG/", "GQA", "GQA"]
    pair = {"identifier": "x-1", "uid": "u", "img0": "p", "img1": "q", "sent": "Both.", "label": 1}
    assert text(tasks.nlvr2(pair, SPEECH)) == "nlvr: Both."
    assert tasks.nlvr2(pair, SPEECH).visuals == ("nlvr/p", "nlvr/q")
    assert [tasks.nlvr2({**pair, "label": label}, SPEECH).targets for label in (0, 1)] == [
        (("false", 1.0),),
        (("true", 1.0),),
    ]
    image = {"cocoid": 9, "filename": "COCO_val2014_000000000042.jpg", "sentences": [{"raw": " A cat. "}] * 5}
    assert text(tasks.caption(image, SPEECH)) == "caption: "
    assert tasks.caption(image, SPEECH).visuals == ("COCO/COCO_val2014_000000000042",)
    assert tasks.caption(image, SPEECH).targets == (("A cat.", 1.0),) * 5


def test_lengths_ratios_and_weighing_are_the_references():
    facts = {name: (t.max_text_length, t.max_target_length, round(60 * t.batch_ratio)) for name, t in TASKS.items()}
    assert facts["vqa"] == (20, 10, 60) and facts["gqa"] == (20, None, 100)
    assert facts["nlvr2"] == (None, None, 20) and facts["caption"] == (40, 40, 50)
    assert {facts[name] for name in ("tvqa", "how2qa", "tvc", "yc2c")} == {(600, 20, 60)}
    assert {name for name, t in TASKS.items() if t.loss_per == "token"} == {"caption", "tvc", "yc2c"}
    assert {name for name, t in TASKS.items() if t.draws_target} == {"vqa", "gqa"}


def test_files_are_where_the_reference_has_them(dataset):
    counts = {name: [len(t.read(dataset, split)[0]) for split in ("train", "val", "test")] for name, t in TASKS.items()}
    assert counts == {name: [24, 6, 6] for name in TASKS} | {"gqa": [48, 6, 6]}
    _, annotations = TASKS["tvqa"].read(dataset, "train")
    assert annotations.subtitles["train0"] == "hello there it is red"


def test_a_task_is_one_function(tmp_path):
    try:

        @task(files={"train": ("sounds.jsonl",)}, id_field="id", max_text_length=10, max_target_length=5)
        def sounds(record, annotations):
            """Name a sound."""
            return Example(id=record["id"], visuals=(f"sounds/{record['file']}",), targets=((record["name"], 1.0),))

        (tmp_path / "sounds.jsonl").write_text(json.dumps({"id": 3, "file": "x", "name": "bark"}) + "\n")
        records, annotations = get_task("sounds").read(tmp_path, "train")
        assert get_task("sounds").checked_example(records[0], annotations).targets == (("bark", 1.0),)
    finally:
        del TASKS["sounds"]


def test_mistakes_say_what_is_wrong(tmp_path):
    with pytest.raises(RegistryError, match=r"Unknown task 'tvqaa'\. Did you mean tvqa"):
        get_task("tvqaa")
    with pytest.raises(DataError, match=r"tvqa has no train annotations: .*tvqa_train.jsonl is not a file"):
        get_task("tvqa").read(tmp_path, "train")
    for change, message in (
        ({"answer_idx": 5}, "answer_idx of 7 is 5; it must be 0 to 4"),
        ({"answer_idx": "a1"}, "answer_idx of 7 is 'a1'"),
        ({"a2": None}, "annotation 7 does not have the form expected"),
    ):
        with pytest.raises(RecordError, match=message):
            get_task("tvqa").checked_example({**QUESTION, **change}, SPEECH)
    without = {name: value for name, value in QUESTION.items() if name != "q"}
    with pytest.raises(RecordError, match=r"The tvqa annotation 7 has no 'q'; it has qid, a0"):
        get_task("tvqa").checked_example(without, SPEECH)
    with pytest.raises(RecordError, match="label of u is 2"):
        get_task("nlvr2").checked_example({"uid": "u", "img0": "p", "img1": "q", "sent": "", "label": 2}, SPEECH)


def test_an_example_survives_json():
    example = tasks.tvqa(QUESTION, SPEECH)
    assert Example.from_json(json.loads(json.dumps(example.to_json())) | {"more": 1}) == example
