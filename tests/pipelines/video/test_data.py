from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from dora_core.data.rows import DataError
from pipelines.video.batches import Collate
from pipelines.video.config import DataSection, ModelSection, TaskSection, VisualSection
from pipelines.video.data import BadRow, TaskRow, TaskRows, collections_of, load_data, probe, report_on
from pipelines.video.encode import TextEncoder
from pipelines.video.extract import extract
from pipelines.video.features import load_encoder
from pipelines.video.looking import open_look
from pipelines.video.model import load_tokenizer
from pipelines.video.visual import open_features

EVERY = ["vqa", "gqa", "nlvr2", "caption", "tvqa", "how2qa", "tvc", "yc2c"]


@pytest.fixture(scope="module")
def text(dataset) -> TextEncoder:
    return TextEncoder(load_tokenizer(ModelSection(path=str(dataset / "model"))))


def opened(dataset, text, tasks=EVERY, *, num_validation=0, **visual):
    section = DataSection(
        tasks=tasks,
        path=str(dataset),
        visual=VisualSection(**{"num_slots": 6} | visual),
        num_validation=num_validation,
    )
    train, held = load_data(section, 0)
    look, _ = open_look(section.visual, section.path, collections_of([*train, *held]), torch.device("cpu"))
    return section, train, held, look, TaskRows(train, text, look, 0)


def collate(train, look, text) -> Collate:
    return Collate([each.task for each in train], look, text.tokenizer.pad_token_id, 2)


def test_captions_are_rows_each_and_questions_draw_their_answer_by_score_anew_in_each_epoch(dataset, text):
    _, train, _, _, rows = opened(dataset, text)
    assert [len(each.places) for each in train] == [24, 48, 24, 48, 24, 24, 48, 24] and len(rows) == 264
    drawn = Counter()
    for epoch in range(60):
        for row in range(24):
            found = rows[epoch * 264 + row]
            answer = text.tokenizer.decode(found.target_ids, skip_special_tokens=True)
            drawn[answer == "grey"] += 1
            assert found.weight == (0.3 if answer == "grey" else 1.0)
    assert drawn[True] / drawn.total() == pytest.approx(0.3 / 1.3, abs=0.03)
    again = rows[5 * 264 + 3]
    assert again.target_ids == rows[5 * 264 + 3].target_ids


def test_a_batch_holds_what_its_rows_say(dataset, text):
    _, train, _, look, rows = opened(dataset, text)
    start = 24 + 48 + 24 + 48  # tvqa's first row
    batch = collate(train, look, text)([rows[start + place] for place in range(4)])
    assert batch["features"].shape == (4, 6, 12) and batch["features"].dtype == torch.float16
    assert batch["feature_mask"].shape == (4, 6) and int(batch["num_pictures"]) == 1
    for place in range(4):
        name = train[4].records[place]["vid_name"]
        stored = open_features(dataset / "tv").read(name)
        real = int(batch["feature_mask"][place].sum())
        assert real == min(6, len(stored))
        if len(stored) <= 6:
            assert np.array_equal(batch["features"][place, :real].numpy(), stored)
        else:
            pooled = torch.nn.functional.adaptive_max_pool1d(torch.from_numpy(stored.astype(np.float32)).T[None], 6)
            assert torch.equal(batch["features"][place].float(), pooled[0].T)
    labels = batch["labels"]
    assert torch.equal(batch["decoder_input_ids"][:, 0], torch.full((4,), 2))
    expected = torch.where(labels[:, :-1] == -100, text.tokenizer.pad_token_id, labels[:, :-1])
    assert torch.equal(batch["decoder_input_ids"][:, 1:], expected)


def test_a_row_counts_once_or_a_token_once_and_scores_weigh_answers(dataset, text):
    _, train, _, look, rows = opened(dataset, text)
    make = collate(train, look, text)
    questions = [rows[place] for place in range(6)]
    batch = make(questions)
    assert batch["counts"]["loss_units"] == 6
    assert torch.allclose(batch["label_weights"].sum(1), torch.tensor([row.weight for row in questions]))
    captions = [rows[24 + 48 + 24 + place] for place in range(6)]
    batch = make(captions)
    assert batch["counts"]["loss_units"] == sum(len(row.target_ids) for row in captions)
    assert torch.equal(batch["label_weights"] > 0, batch["labels"] != -100)
    assert set(batch["label_weights"].unique().tolist()) <= {0.0, 1.0}


def test_two_pictures_stand_one_after_the_other_and_padding_may_be_seen(dataset, text):
    _, train, _, look, rows = opened(dataset, text, ["nlvr2"], reference_padding=True)
    batch = collate(train, look, text)([rows[0], rows[1]])
    assert batch["features"].shape == (2, 12, 12) and int(batch["num_pictures"]) == 2
    stored = open_features(dataset / "nlvr")
    assert np.array_equal(batch["features"][0, 6:10].numpy(), stored.read("train0b"))
    assert not batch["features"][0, 4:6].any() and batch["feature_mask"].all()


def test_an_empty_batch_is_a_row_of_padding_without_targets(dataset, text):
    _, train, _, look, _ = opened(dataset, text)
    batch = collate(train, look, text)([])
    assert batch["input_ids"].shape[0] == 1 and (batch["labels"] == -100).all()
    assert batch["features"].shape == (1, 1, 12)
    assert batch["counts"] == dict.fromkeys(batch["counts"], 0)


def test_a_row_that_cannot_be_used_costs_itself(dataset, text, tmp_path):
    _, train, _, look, _ = opened(dataset, text, [TaskSection(name="tvqa", max_text_length=20), "tvc"])
    rows = TaskRows(train, text, look, 0)
    bad = rows[0]
    assert isinstance(bad, BadRow) and bad.where == "tvqa 0" and "at most 20 are allowed" in bad.reason
    assert isinstance(rows[24], TaskRow)
    with pytest.raises(DataError, match="The task tvqa: none of 8 rows tried can be used; the first is tvqa 0"):
        probe(rows, train)
    counts = collate(train, look, text)([bad, bad])["counts"]
    assert counts["num_rows"] == counts["num_bad"] == 2 and counts["loss_units"] == 0


def test_validation_rows_are_drawn_from_each_tasks_validation_split(dataset, text):
    _, _, held, look, _ = opened(dataset, text, num_validation=4)
    assert [len(each.places) for each in held] == [4] * 8
    assert held[1].annotations.split == "val" and "GQA" in look.folders and "VG" in look.folders
    assert all(isinstance(row, TaskRow) for row in TaskRows(held, text, look, 0))


def test_the_hash_of_the_data_knows_what_shapes_rows(dataset, text):
    def digest(**changes):
        section, train, held, look, _ = opened(dataset, text, **changes)
        return report_on(section, train, held, look).dataset_hash

    hashes = [digest(), digest(), digest(tasks=["tvqa"]), digest(num_slots=5), digest(num_validation=2)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def test_features_of_different_sizes_are_refused(dataset, text, tmp_path):
    np.savez(tmp_path / "a.npz", features=np.zeros((3, 5), np.float16))
    with pytest.raises(ValueError, match=r"have different sizes \(tv 5, yc2 12\)"):
        opened(dataset, text, ["tvc", "yc2c"], folders={"tv": str(tmp_path)})


def test_features_of_different_encoders_and_speech_of_no_video_are_refused(dataset, text, tmp_path):
    for name, encoder in (("tv", "pixels:2"), ("yc2", "pixels:2:other")):
        media = tmp_path / "media" / name
        media.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(media / "train0.png")
        made = load_encoder("pixels:2")
        made.identity["model"] = encoder
        extract(media, tmp_path / name, made, say=lambda line: None)
    folders = {name: str(tmp_path / name) for name in ("tv", "yc2")}
    with pytest.raises(ValueError, match=r"features of tv and of yc2 .* \(they differ in model\)"):
        opened(dataset, text, ["tvc", "yc2c"], folders=folders)
    for name in ("yc2c",):
        (tmp_path / "video" / "ann").mkdir(parents=True)
        (tmp_path / "video" / "ann" / name).symlink_to(dataset / "video" / "ann" / name)
    speech = '{"vid_name": "another", "sub": [{"text": "hi", "start": 0, "end": 1}]}\n'
    (tmp_path / "video" / "ann" / "yc2_subtitles.jsonl").write_text(speech)
    with pytest.raises(DataError, match="No video of the task yc2c has subtitles"):
        load_data(DataSection(tasks=["yc2c"], path=str(tmp_path)), 0)
    (tmp_path / "video" / "ann" / "yc2_subtitles.jsonl").write_text('{"video": "another"}\n')
    with pytest.raises(DataError, match=r"The task yc2c cannot read the annotations .*KeyError: 'vid_name'"):
        load_data(DataSection(tasks=["yc2c"], path=str(tmp_path)), 0)
