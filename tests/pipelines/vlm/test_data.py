from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dora_core.data.collate import IGNORED
from dora_core.data.loader import StepLoader
from dora_core.data.rows import DataError, read_rows
from dora_core.data.sampler import StepPlan
from dora_core.data.shards import write_shards
from pipelines.vlm.batches import Collate, to_model
from pipelines.vlm.config import DataSection, SourceSection
from pipelines.vlm.conversation import IMAGE_MARK, render
from pipelines.vlm.data import ConversationRows, load_training_data
from pipelines.vlm.encode import BadRow, Encoder, VisionRow, tokenize
from pipelines.vlm.sources import open_source
from pipelines.vlm.towers import VisionFacts

VISION = VisionFacts(size=16, num_tokens=4)


def llama_like() -> PreTrainedTokenizerFast:
    """A tokenizer as LLaMA's: pieces begin with the space before them, unknown characters are bytes."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *tokens], show_progress=False, min_frequency=1
    )
    text = "A chat between USER: what colour is the bus ASSISTANT: Red blue 2 It is a bus"
    backend.train_from_iterator(text.split() * 10, trainer)  # word by word: no token reaches over a space
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    return tokenizer


@pytest.fixture(params=["byte-level", "llama-like"])
def tokenizer(request, tokenizer_folder) -> PreTrainedTokenizerFast:
    return llama_like() if request.param == "llama-like" else PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture
def plain_tokenizer(tokenizer_folder) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


def talk(*turns: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": "1",
        **fields,
        "conversations": [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(turns)],
    }


def section(tmp_path: Path, rows: list[dict], **options: Any) -> DataSection:
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return DataSection(**{"train": [str(tmp_path / "rows.json")], "images": str(tmp_path), "num_workers": 0, **options})


def picture(path: Path, colour: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (20, 12)) -> None:
    Image.new("RGB", size, colour).save(path)


def rows_of(data: DataSection, tokenizer: PreTrainedTokenizerFast) -> ConversationRows:
    return load_training_data(data, Encoder(tokenizer, VISION, data), 0)[0]


ROWS = [
    talk("<image>\nWhat colour is the bus?", "Red", "How many?", "2", image="a.jpg"),
    talk("What?\n<image>", "It is a bus, é 🚌.", image="a.jpg"),
    talk("Is <image> like <image>?", "yes", image=["a.jpg", "b.jpg"]),
    talk("Hello there", "Hi", "And?", " spaced  out ", "Why?", ""),
]


@pytest.mark.parametrize("template", ["v1", "plain"])
def test_the_loss_is_on_the_answers_spans_and_nowhere_else_token_by_token(tmp_path, tokenizer, template):
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg")
    data = section(tmp_path, ROWS, template=template)
    for row, images in ((ROWS[0], 1), (ROWS[1], 1), (ROWS[2], 2), (ROWS[3], 0)):
        rendered = render(row, images, template, tokenizer)
        encoded = Encoder(tokenizer, VISION, data).encode(row, [str(tmp_path / "a.jpg")] * images)
        ids, spans = tokenize(tokenizer, rendered)
        image_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
        place, covered = 0, set()
        for token, (start, end) in zip(ids, spans, strict=True):
            if token == image_id:
                assert encoded.tokens.input_ids[place : place + 4] == [image_id] * 4
                assert encoded.tokens.labels[place : place + 4] == [IGNORED] * 4
                place += 4
                continue
            inside = any(start < stop and end > begin for begin, stop in rendered.answers)
            assert encoded.tokens.input_ids[place] == token
            assert encoded.tokens.labels[place] == (token if inside else IGNORED)
            covered |= set(range(start, end)) if inside else set()
            place += 1
        assert place == len(encoded.tokens.input_ids)
        assert covered == {spot for begin, stop in rendered.answers for spot in range(begin, stop)}
        assert len(encoded.pixels) == images


def test_the_labels_decode_to_the_answers_with_their_end_tokens(tmp_path, tokenizer):
    picture(tmp_path / "a.jpg")
    encoded = rows_of(section(tmp_path, ROWS[:1]), tokenizer)[0]
    labels = [label for label in encoded.tokens.labels if label != IGNORED]
    assert tokenizer.decode(labels, clean_up_tokenization_spaces=False).split() == ["Red</s>", "2</s>"]
    assert encoded.tokens.input_ids[0] == tokenizer.bos_token_id
    assert encoded.tokens.input_ids[-1] == tokenizer.eos_token_id


def test_the_text_around_an_image_is_tokenized_by_itself_as_llava_does():
    tokenizer = llama_like()
    for template in ("v1", "plain"):
        rendered = render(ROWS[0], 1, template, tokenizer)
        before, after = rendered.text.split(IMAGE_MARK)
        expected = [*tokenizer(before)["input_ids"], tokenizer.convert_tokens_to_ids(IMAGE_MARK)]
        expected += tokenizer(after, add_special_tokens=False)["input_ids"]
        ids, spans = tokenize(tokenizer, rendered)
        assert ids == expected
        assert (
            tokenizer.convert_ids_to_tokens(ids)[ids.index(tokenizer.convert_tokens_to_ids(IMAGE_MARK)) + 1][0] == "▁"
        )
        assert spans[0] == (0, 0) and spans[-1][1] == len(rendered.text)


def test_an_end_token_that_the_tokenizer_adds_does_not_come_twice(tmp_path):
    tokenizer = llama_like()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    encoded = rows_of(section(tmp_path, [talk("Q", "Red")]), tokenizer)[0]
    assert encoded.tokens.input_ids.count(2) == 1


def test_rows_are_cut_after_the_image_tokens_are_placed(tmp_path, plain_tokenizer):
    picture(tmp_path / "a.jpg")
    long = talk("<image>\nWhat colour is the bus?", "Red " * 50, image="a.jpg")
    whole = rows_of(section(tmp_path, [long]), plain_tokenizer)[0]
    cut = rows_of(section(tmp_path, [long], max_length=40), plain_tokenizer)[0]
    assert not whole.truncated and cut.truncated
    assert cut.tokens.input_ids == whole.tokens.input_ids[:40]
    assert cut.tokens.labels == whole.tokens.labels[:40]
    assert len(cut.pixels) == 1


def test_an_image_that_would_be_cut_is_left_out_whole(tmp_path, plain_tokenizer):
    picture(tmp_path / "a.jpg")
    row = talk("<image> and <image>?", "no", image=["a.jpg", "a.jpg"])
    whole = rows_of(section(tmp_path, [row]), plain_tokenizer)[0].tokens.input_ids
    image_id = plain_tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    second = [place for place, token in enumerate(whole) if token == image_id][4]
    for max_length in range(second, second + 4):
        cut = rows_of(section(tmp_path, [row], max_length=max_length), plain_tokenizer)[0]
        assert cut.tokens.input_ids == whole[:second]
        assert len(cut.pixels) == 1
    assert len(rows_of(section(tmp_path, [row], max_length=second + 4), plain_tokenizer)[0].pixels) == 2


def test_a_row_that_cannot_be_used_is_said_to_be_bad_with_its_place_and_reason(tmp_path, plain_tokenizer):
    picture(tmp_path / "a.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:200])
    rows = [
        talk("<image>", "x", image="a.jpg"),
        talk("<image>", "x", image="broken.jpg", id="b"),
        talk("<image>", "x", image="gone.jpg"),
        talk("no mark", "x", image="a.jpg"),
        talk("<image>", "x", image="../a.jpg"),
        talk("<image>", "x", image="/etc/passwd"),
        talk("say <image>", "<image>"),
        {"id": 3},
    ]
    loaded = rows_of(section(tmp_path, rows), plain_tokenizer)
    assert isinstance(loaded[0], VisionRow)
    found = [loaded[place] for place in range(1, len(rows))]
    assert all(isinstance(row, BadRow) for row in found)
    assert f"{tmp_path}/rows.json, row 2, id 'b'" == found[0].where
    for row, reason in zip(
        found,
        ("broken.jpg", "gone.jpg", "stands 0 times", "leaves the folder", "leaves", "stands 1", "conversations"),
        strict=True,
    ):
        assert reason in row.reason


def test_a_source_with_nothing_usable_ends_the_run_before_it_begins(tmp_path, plain_tokenizer):
    rows = [talk("<image>", "x", image=f"{number}.jpg") for number in range(30)]
    with pytest.raises(DataError, match=r"none of 16 rows tried can be used.*0\.jpg.*Check data.train and data.images"):
        rows_of(section(tmp_path, rows), plain_tokenizer)


def test_images_need_a_folder(tmp_path, plain_tokenizer):
    with pytest.raises(DataError, match=r"Set data\.images"):
        rows_of(section(tmp_path, [talk("<image>", "x", image="a.jpg")], images=None), plain_tokenizer)


def test_shards_hold_the_same_rows_as_json_and_a_folder(tmp_path, plain_tokenizer):
    rows, samples = [], []
    for number in range(5):
        picture(tmp_path / f"{number}.jpg", (number * 40, 0, 0))
        row = talk("<image>\nwhat?", f"{number}", image=f"{number}.jpg") if number != 3 else talk("hello", "3")
        rows.append(row)
        sample = {"__key__": f"{number:03d}", "json": json.dumps(row).encode()}
        samples.append(sample | ({"jpg": (tmp_path / f"{number}.jpg").read_bytes()} if number != 3 else {}))
    samples.append(
        {"__key__": "pair", "json": json.dumps(talk("<image><image>", "two")).encode()}
        | {f"{place}.jpg": (tmp_path / f"{place}.jpg").read_bytes() for place in (0, 1)}
    )
    write_shards(samples, tmp_path / "shards", max_count=2)
    data = section(tmp_path, rows)
    from_json = rows_of(data, plain_tokenizer)
    from_shards = rows_of(section(tmp_path, rows, train=[str(tmp_path / "shards")]), plain_tokenizer)
    assert len(from_shards) == 6
    for place in range(5):
        first, second = from_json[place], from_shards[place]
        assert first.tokens == second.tokens
        assert all(torch.equal(a, b) for a, b in zip(first.pixels, second.pixels, strict=True))
    assert len(from_shards[5].pixels) == 2
    assert from_shards.modalities() == [1, 1, 1, 0, 1, 1]
    assert isinstance(pickle.loads(pickle.dumps(from_shards))[0], VisionRow)


def test_the_images_of_a_sample_come_in_the_order_of_their_numbers(tmp_path):
    members = {f"{number}.png": bytes([number]) for number in range(12)}
    write_shards([{"__key__": "a", "json": b"{}", **members, "mask.png": b"x"}], tmp_path / "shards")
    _, images = open_source(str(tmp_path / "shards"), None).read(0)
    assert images == [bytes([number]) for number in range(12)]


def test_a_sample_without_json_is_a_bad_row(tmp_path, plain_tokenizer):
    good = {"__key__": "a", "json": json.dumps(talk("hello", "x")).encode()}
    bad = [{"__key__": "b", "txt": b"x"}, {"__key__": "c", "json": b"{"}, {"__key__": "d", "json": b"[]"}]
    write_shards([good, *bad], tmp_path / "shards")
    rows = rows_of(section(tmp_path, [], train=[str(tmp_path / "shards")]), plain_tokenizer)
    assert ["shard-000000.tar" in rows[place].where for place in (1, 2, 3)] == [True] * 3
    assert ["must have json" in rows[1].reason, "cannot be read" in rows[2].reason, "is a list" in rows[3].reason] == [
        True
    ] * 3


def test_sources_are_mixed_by_weight_and_rows_are_held_out_of_all(tmp_path, plain_tokenizer):
    for name, count in (("one", 20), ("two", 10)):
        (tmp_path / f"{name}.json").write_text(json.dumps([talk("Q", f"{name} {n}") for n in range(count)]))
    sources = [str(tmp_path / "one.json"), SourceSection(rows=str(tmp_path / "two.json"), weight=3)]
    data = DataSection(train=sources, num_validation=6, num_workers=0)
    rows, validation, mixture, report = load_training_data(data, Encoder(plain_tokenizer, VISION, data), 0)
    num_two = sum(place >= 20 for place in rows.places)
    assert (len(rows), len(validation), report.num_rows, report.num_validation) == (24, 6, 24, 6)
    assert not set(rows.places) & set(validation.places)
    assert report.epoch_size == mixture.epoch_size == 24 - num_two + 3 * num_two
    assert report.num_with_images == 0
    other = DataSection(train=sources[:1], num_workers=0)
    assert load_training_data(other, Encoder(plain_tokenizer, VISION, other), 0)[2] is None


def test_lengths_count_characters_and_images(tmp_path, plain_tokenizer):
    picture(tmp_path / "a.jpg")
    rows = rows_of(
        section(tmp_path, [talk("<image>" + "x" * 33, "y" * 8, image="a.jpg"), talk("x", "y")]), plain_tokenizer
    )
    assert rows.lengths() == [48 // 4 + 4, 0]
    assert rows.modalities() == [1, 0]


def test_a_batch_counts_what_it_holds_and_lists_what_it_left_out(tmp_path, plain_tokenizer):
    picture(tmp_path / "a.jpg")
    rows = rows_of(
        section(tmp_path, [*ROWS[:2], talk("<image>", "x", image="gone.jpg"), talk("x " * 30, "y")], max_length=30),
        plain_tokenizer,
    )
    batch = Collate(plain_tokenizer.pad_token_id, VISION.size)([rows[place] for place in range(4)])
    counts = batch["counts"]
    assert (counts["num_rows"], counts["num_bad"], counts["num_images"]) == (4, 1, 2)
    assert counts["num_truncated"] >= 1 and counts["num_untrainable"] == 1
    assert counts["num_tokens"] == int(batch["attention_mask"].sum())
    assert [row.where.split(", ")[1] for row in batch["bad_rows"]] == ["row 3"]
    assert batch["pixel_values"].shape == (2, 3, 16, 16) and batch["pixel_values"].dtype == torch.uint8
    assert batch["input_ids"].shape[0] == 3


def test_a_batch_without_images_has_a_blank_one_and_an_empty_batch_a_row_of_padding(tmp_path, plain_tokenizer):
    rows = rows_of(section(tmp_path, [talk("hello", "x")]), plain_tokenizer)
    collate = Collate(plain_tokenizer.pad_token_id, VISION.size)
    for batch in (collate([rows[0]]), collate([]), collate([BadRow("x", "y")])):
        assert batch["pixel_values"].shape == (1, 3, 16, 16) and not batch["pixel_values"].any()
        assert batch["counts"]["num_images"] == 0
    assert collate([])["counts"] == dict.fromkeys(collate([])["counts"], 0)
    assert (collate([])["labels"] == IGNORED).all()


def test_pixels_reach_the_model_normalised_in_its_type(tmp_path, plain_tokenizer):
    picture(tmp_path / "a.jpg")
    data = section(tmp_path, ROWS[:1])
    encoder = Encoder(plain_tokenizer, VISION, data)
    batch = Collate(plain_tokenizer.pad_token_id, VISION.size)([rows_of(data, plain_tokenizer)[0]])
    tensors = to_model(batch, encoder.transform, torch.bfloat16, torch.device("cpu"))
    assert set(tensors) == {"input_ids", "labels", "attention_mask", "pixel_values"}
    assert tensors["pixel_values"].dtype == torch.bfloat16
    red = tensors["pixel_values"][0, 0, 8, 8].float()
    assert red == pytest.approx((254 / 255 - VISION.mean[0]) / VISION.std[0], abs=0.02)


def test_open_source_tells_shards_from_json(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(talk("a", "b")) + "\n")
    write_shards([{"__key__": "a", "json": json.dumps(talk("a", "b")).encode()}], tmp_path / "shards")
    assert type(open_source(str(tmp_path / "rows.jsonl"), None)).__name__ == "JsonSource"
    for name in (tmp_path / "shards", tmp_path / "shards" / "shard-{000000..000000}.tar"):
        assert type(open_source(str(name), None)).__name__ == "ShardSource"
    with pytest.raises(DataError):
        open_source(str(tmp_path / "nothing.tar"), None)


def test_worker_processes_make_the_same_batches(tmp_path, plain_tokenizer):
    picture(tmp_path / "a.jpg")
    rows = rows_of(section(tmp_path, [*ROWS[:2], talk("<image>", "x", image="gone.jpg"), ROWS[3]]), plain_tokenizer)
    plan = StepPlan(num_rows=4, global_batch_size=2, micro_batch_size=2, seed=0)
    collate = Collate(plain_tokenizer.pad_token_id, VISION.size)
    alone, others = (list(StepLoader(plan, rows, collate, end_step=4, num_workers=n)) for n in (0, 2))
    for first, second in zip(alone, others, strict=True):
        assert first[0]["counts"] == second[0]["counts"] and first[0]["bad_rows"] == second[0]["bad_rows"]
        assert all(torch.equal(first[0][name], second[0][name]) for name in ("input_ids", "labels", "pixel_values"))


def test_row_files_beside_shards_are_told_from_their_indices(tmp_path, plain_tokenizer):
    write_shards([{"__key__": "a", "json": json.dumps(talk("a", "b")).encode()}], tmp_path / "mixed")
    rows_of(section(tmp_path, [], train=[str(tmp_path / "mixed")]), plain_tokenizer)
    assert list((tmp_path / "mixed").glob("*.index.json"))
    (tmp_path / "mixed" / "rows.json").write_text(json.dumps([talk("c", "d")]))
    assert len(read_rows(str(tmp_path / "mixed"))) == 1
