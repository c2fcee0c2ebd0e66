"""Which annotations the evaluators of the video pipeline refuse, and what they say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_core.data.rows import DataError
from pipelines.video.evaluators.gqa import GQA
from pipelines.video.evaluators.questions import TVQA
from pipelines.video.task import RecordError

SUBTITLES = [{"vid_name": "clip1", "sub": []}]


def settings(root: Path, limit: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(path=str(root), split="test", limit=limit)


def write(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))


def gqa_record(number: int, answer: str | None = "yes") -> dict[str, Any]:
    record = {"question_id": f"q{number}", "img_id": f"n{number}", "sent": f"Is it {number}?"}
    return record if answer is None else {**record, "label": {answer: 1.0}}


def tvqa_record(number: int, **changes: Any) -> dict[str, Any]:
    choices = {f"a{place}": f"choice {place}" for place in range(5)}
    return {"qid": number, "q": "Why?", "ts": "1.0-2.5", "vid_name": "clip1", **choices, "answer_idx": 2, **changes}


def write_tvqa(root: Path, records: Sequence[dict[str, Any]]) -> None:
    write(root / "video/ann/tvqa/tvqa_test_public.jsonl", records)
    write(root / "video/ann/tv_subtitles.jsonl", SUBTITLES)


def test_the_limit_keeps_the_first_rows_and_only_they_are_checked(tmp_path: Path) -> None:
    write(tmp_path / "GQA/testdev.json", [gqa_record(1), gqa_record(2), {"question_id": "q3"}])
    assert [row["id"] for row in GQA().load(settings(tmp_path, limit=2))] == ["q1", "q2"]
    with pytest.raises(
        RecordError, match=r"gqa annotation q3 has no 'img_id'; it has question_id\. Correct it in GQA/"
    ):
        GQA().load(settings(tmp_path))


def test_an_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "GQA/testdev.json", [gqa_record(1), gqa_record(2), gqa_record(1)])
    message = r"video/gqa has 2 annotations with the id q1; each id must occur once\. Remove .*GQA/testdev\.json"
    with pytest.raises(DataError, match=message):
        GQA().load(settings(tmp_path))


def test_ids_that_a_submission_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    write_tvqa(tmp_path, [tvqa_record(1), tvqa_record(1, qid="1")])
    with pytest.raises(DataError, match="2 annotations with the id 1"):
        TVQA().load(settings(tmp_path))


def test_answers_to_some_rows_only_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "GQA/testdev.json", [gqa_record(1), gqa_record(2, None)])
    with pytest.raises(DataError, match=r"the answers to 1 of 2 annotations; it must have them for all or for none"):
        GQA().load(settings(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"holds no rows"),
        ("{", r"testdev\.json, line 1: not JSON"),
        ("[3]", r"found a int; a row must be a JSON object"),
        ('[{"question_id": 1, "img_id": "n", "sent": "x", "label": ["yes"]}]', r"does not have the form expected"),
        ('[{"question_id": 1, "img_id": "n", "sent": 5}]', r"gqa annotation 1 asks 5 .*a question must be a text"),
        ('[{"question_id": 1, "img_id": "n", "sent": "x", "label": {"a": "b"}}]', r"an answer a text with a number"),
    ],
)
def test_a_malformed_file_is_refused_with_what_it_should_hold(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "GQA").mkdir()
    (tmp_path / "GQA/testdev.json").write_text(content, encoding="utf-8")
    with pytest.raises((DataError, RecordError), match=message):
        GQA().load(settings(tmp_path))


@pytest.mark.parametrize(
    "lines", [[{"sub": []}], [{"vid_name": "clip1", "sub": [{"start": 1}]}], [{"vid_name": "clip1", "sub": 5}]]
)
def test_malformed_subtitles_are_refused(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    write_tvqa(tmp_path, [tvqa_record(7)])
    write(tmp_path / "video/ann/tv_subtitles.jsonl", lines)
    message = (
        r"The task tvqa cannot read the annotations .*form.* Download .*tvqa_test_public\.jsonl and .*tv_subtitles"
    )
    with pytest.raises(DataError, match=message):
        TVQA().load(settings(tmp_path))


def test_missing_subtitles_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "video/ann/tvqa/tvqa_test_public.jsonl", [tvqa_record(7)])
    with pytest.raises(DataError, match=r"tv_subtitles\.jsonl"):
        TVQA().load(settings(tmp_path))
