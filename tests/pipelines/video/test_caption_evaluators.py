"""COCO captions, TVC and YouCook2 captions: what is scored, against what, and what is submitted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_core.data.rows import DataError
from dora_core.evaluation.captions import METEOR_KIND, caption_scores
from dora_core.evaluation.evaluator import EvaluationContext
from pipelines.video.evaluators.captions import TVC, YC2C, COCOCaption
from pipelines.video.task import RecordError

Row = dict[str, Any]


def settings(root: Path, split: str = "val", limit: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(path=str(root), split=split, limit=limit)


def write(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text, encoding="utf-8")


def write_clips(root: Path, name: str, descriptions: list[list[str] | None], split: str = "val") -> None:
    records = [
        {"vid_name": f"v{number}", "clip_id": number, "duration": 9.0, "ts": [3.1, 9.4]}
        | ({} if texts is None else {"descs": [{"desc": text, "desc_id": 1} for text in texts]})
        for number, texts in enumerate(descriptions, 1)
    ]
    write(root / f"video/ann/{name}/{name}_{split}_release.jsonl", records)
    subtitles = {"tvc": "tv", "yc2c": "yc2"}[name]
    write(root / f"video/ann/{subtitles}_subtitles.jsonl", [{"vid_name": "v1", "sub": [{"text": "hello"}]}])


def write_coco(root: Path, captions: list[list[str]]) -> None:
    images = [
        {"filename": f"COCO_val2014_{number}.jpg", "cocoid": number, "split": split, "sentences": sentences}
        for number, texts in enumerate(captions, 1)
        for split, sentences in [("test", [{"raw": text} for text in texts])]
    ]
    write(root / "COCO/dataset_coco.json", {"images": [*images, {"split": "train"}], "dataset": "coco"})


def answered(evaluator: Any, rows: list[Row], texts: list[str]) -> list[Row]:
    return [evaluator.prediction(row, text) for row, text in zip(rows, texts, strict=True)]


def submitted(evaluator: Any, predictions: list[Row], root: Path, split: str) -> dict[str, str]:
    context = EvaluationContext(model=None, tokenizer=None, section=settings(root, split))
    evaluator.write_files(predictions, root / "out", context)
    return {path.name: path.read_text(encoding="utf-8") for path in (root / "out/submissions").iterdir()}


def test_captions_are_scored_by_cider_then_by_three_other_metrics(tmp_path: Path) -> None:
    write_clips(tmp_path, "yc2c", [["stir the hot soup slowly"], ["cut an onion into pieces"]])
    rows = YC2C().load(settings(tmp_path))
    assert (rows[0]["vid_name"], rows[0]["cuttable"], rows[1]["cuttable"]) == ("v1", "hello", "")
    predictions = answered(YC2C(), rows, ["Stir the hot soup slowly.", "fry five eggs"])
    cider, bleu4, meteor, rouge_l = YC2C().score(predictions)
    assert [each.metric for each in (cider, bleu4, meteor, rouge_l)] == ["cider", "bleu4", "meteor", "rouge_l"]
    assert {(each.name, each.n) for each in (cider, bleu4, meteor, rouge_l)} == {("video/yc2c", 2)}
    assert cider.value == pytest.approx(5.0), "10 for the same words, 0 for others"
    assert cider.stderr == pytest.approx(5.0 / math.sqrt(2))
    assert (rouge_l.value, bleu4.stderr) == (0.5, None)
    assert bleu4.value == pytest.approx(math.exp(1 - 10 / 8) * (5 / 8 * 4 / 6 * 3 / 4 * 2 / 2) ** 0.25, abs=1e-6)
    assert cider.extra == {
        "tokenizer": "treebank",
        "num_references": 2,
        "majority": pytest.approx(5.0),
        "majority_answer": "stir the hot soup slowly",
    }
    assert meteor.extra["kind"] == METEOR_KIND
    assert "cuttable" not in predictions[0]


def test_a_clip_is_compared_with_all_its_references(tmp_path: Path) -> None:
    first = ["one two three four", "five six seven eight", "nine ten eleven twelve", "some more words here"]
    second = ["red green blue black", "pink teal cyan gold"]
    write_clips(tmp_path, "tvc", [first, second])
    predictions = answered(TVC(), TVC().load(settings(tmp_path)), ["one two three four", "pink teal cyan gold"])
    cider = TVC().score(predictions)[0]
    assert cider.value == pytest.approx((10 / 4 + 10 / 2) / 2)
    assert cider.extra["num_references"] == 6
    assert cider.extra["majority"] == pytest.approx(10 / 2 / 2), "one caption of the second clip given to both"
    assert cider.extra["majority_answer"] in second


def test_cider_is_the_library_s_corpus_value_and_the_constant_s_level_is_its_score(tmp_path: Path) -> None:
    references = [
        ["a dog runs on the grass", "the dog is running"],
        ["a cat sits on a mat", "a dog runs on the grass"],
        ["two men eat"],
    ]
    write_coco(tmp_path, references)
    texts = ["a dog runs", "a cat sits on the grass", ""]
    cider = COCOCaption().score(answered(COCOCaption(), COCOCaption().load(settings(tmp_path, "test")), texts))[0]
    assert cider.value == pytest.approx(caption_scores(texts, references).cider.corpus, abs=1e-12)
    constant = [cider.extra["majority_answer"]] * 3
    assert cider.extra["majority"] == pytest.approx(caption_scores(constant, references).cider.corpus, abs=1e-12)
    others = [caption_scores([text] * 3, references).cider.corpus for row in references for text in row]
    assert cider.extra["majority"] == pytest.approx(max(others), abs=1e-12)


def test_value_removes_what_is_not_ascii_and_coco_does_not() -> None:
    text = "Zoë’s café "
    assert [each().judge({}, text) for each in (TVC, YC2C)] == [{"pred": "Zos caf"}] * 2
    assert COCOCaption().judge({}, text) == {"pred": "Zoë’s café"}


def test_references_lose_what_is_not_ascii_as_captions_do(tmp_path: Path) -> None:
    write_clips(tmp_path, "tvc", [["Zoë pours hot cofféé"], ["red green blue black"]])
    predictions = answered(TVC(), TVC().load(settings(tmp_path)), ["zo pours hot coff", "x"])
    assert TVC().score(predictions)[0].value == pytest.approx(5.0)


def test_coco_takes_karpathys_test_pictures_and_submits_what_its_tool_reads(tmp_path: Path) -> None:
    write_coco(tmp_path, [["A dog .", " Two dogs. "], ["A cat."]])
    rows = COCOCaption().load(settings(tmp_path, "test"))
    assert [row["targets"] for row in rows] == [[["A dog .", 1.0], ["Two dogs.", 1.0]], [["A cat.", 1.0]]]
    assert rows[0]["visuals"] == ["COCO/COCO_val2014_1"]
    [(name, text)] = submitted(COCOCaption(), answered(COCOCaption(), rows, ["a dog", ""]), tmp_path, "test").items()
    assert name == "coco_caption_test_predictions.json"
    assert json.loads(text) == [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": ""}]


@pytest.mark.parametrize("evaluator", [TVC(), YC2C()])
@pytest.mark.parametrize("split", ["test", "val"])
def test_value_gets_a_line_a_clip_also_where_the_references_are_withheld(
    evaluator: Any, split: str, tmp_path: Path
) -> None:
    write_clips(tmp_path, evaluator.benchmark, [None, None], split)
    predictions = answered(evaluator, evaluator.load(settings(tmp_path, split)), ["a café", "a dog"])
    assert evaluator.score(predictions) == []
    [(name, text)] = submitted(evaluator, predictions, tmp_path, split).items()
    assert name == f"{evaluator.benchmark}_{split}_predictions.jsonl"
    assert [json.loads(line) for line in text.splitlines()] == [
        {"vid_name": "v1", "clip_id": 1, "descs": [{"desc": "a café"}]},
        {"vid_name": "v2", "clip_id": 2, "descs": [{"desc": "a dog"}]},
    ]


def test_captions_without_words_are_scored_as_nothing(tmp_path: Path) -> None:
    write_clips(tmp_path, "tvc", [["a dog runs here"], ["red green blue black"]])
    metrics = TVC().score(answered(TVC(), TVC().load(settings(tmp_path)), ["", "!!! é"]))
    assert [each.value for each in metrics[:1] + metrics[2:]] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("texts", [[""], ["..."], ["日本"]])
def test_references_without_a_word_are_refused_when_they_are_read(texts: list[str], tmp_path: Path) -> None:
    write_clips(tmp_path, "tvc", [["a dog"], texts])
    with pytest.raises(DataError, match=r"video/tvc: 2 has the references .*; at least one must have a word.*Correct"):
        TVC().load(settings(tmp_path))


def test_references_to_some_clips_only_are_refused(tmp_path: Path) -> None:
    write_clips(tmp_path, "tvc", [["a dog"], None])
    with pytest.raises(DataError, match=r"the answers to 1 of 2 annotations"):
        TVC().load(settings(tmp_path))
    assert len(TVC().load(settings(tmp_path, limit=1))) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", r"The task caption cannot read .*KeyError: 'images'.*Download COCO/dataset_coco\.json again"),
        ("[", r"The task caption cannot read .*JSONDecodeError"),
        ('{"images": ["x"]}', r"The task caption cannot read .*TypeError"),
        (
            '{"images": [{"split": "train"}]}',
            r"video/coco_caption has 0 annotations of the split test .*evaluate\.limit",
        ),
        ('{"images": [{"split": "test", "cocoid": 4}]}', r"caption annotation 4 has no 'filename'"),
    ],
)
def test_a_malformed_file_of_karpathys_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "COCO").mkdir()
    (tmp_path / "COCO/dataset_coco.json").write_text(content, encoding="utf-8")
    with pytest.raises((DataError, RecordError), match=message):
        COCOCaption().load(settings(tmp_path, "test"))
