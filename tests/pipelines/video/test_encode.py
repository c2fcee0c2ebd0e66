from __future__ import annotations

import json

import pytest

from dora_core.config import load_config
from pipelines.video.config import RECIPES, ModelSection, VideoConfig
from pipelines.video.encode import EXTRA_TOKENS, TextEncoder
from pipelines.video.model import load_tokenizer, text_encoder
from pipelines.video.task import Example, RecordError

AFTER = " [Q] what colour is it [TS] (0.5-2.25) [Choices] a0: red. a1: blue. tvqa: "


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return load_tokenizer(ModelSection(path=str(dataset / "model")))


def example(subtitles: str, after: str = AFTER) -> Example:
    return Example(id=7, visuals=("tv/a",), before="[Subs] ", cuttable=subtitles, after=after)


def words(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_a_text_that_fits_is_the_prompt_between_the_tokenizers_ends(tokenizer):
    ids, cut = TextEncoder(tokenizer).text(example("hello there"), 600)
    assert words(tokenizer, ids) == "<s>[Subs] hello there" + AFTER + "</s>" and not cut


@pytest.mark.parametrize("max_length", [60, 90, 150, 599])
def test_only_subtitles_are_cut_so_that_question_choices_and_tag_survive(tokenizer, max_length):
    speech = " ".join(["hello there it is red"] * 200)
    whole, _ = TextEncoder(tokenizer).text(example(speech), None)
    assert len(whole) > 600
    ids, cut = TextEncoder(tokenizer).text(example(speech), max_length)
    text = words(tokenizer, ids)
    assert cut and len(ids) == max_length
    assert text.startswith("<s>[Subs] hello") and text.endswith(AFTER + "</s>")
    assert speech.startswith(text.removeprefix("<s>[Subs] ").removesuffix(AFTER + "</s>").rstrip())


def test_the_papers_code_cuts_off_question_and_tag(tokenizer):
    speech = " ".join(["hello there"] * 400)
    ids, cut = TextEncoder(tokenizer, reference_truncation=True).text(example(speech), 100)
    whole, _ = TextEncoder(tokenizer).text(example(speech), None)
    assert cut and ids == [*whole[:99], whole[-1]] and "tvqa" not in words(tokenizer, ids)


def test_a_question_that_does_not_fit_without_subtitles_is_an_error_that_names_it(tokenizer):
    with pytest.raises(RecordError, match=r"The text of 7 has \d+ tokens, of which \d+ may be cut; at most 20"):
        TextEncoder(tokenizer).text(example("hello there"), 20)


def test_a_task_name_may_be_left_out_of_image_tasks_but_the_mark_of_subtitles_stays(tokenizer):
    plain = TextEncoder(tokenizer, task_prompts=False)
    question = Example(id=1, visuals=("COCO/a",), before="vqa: ", cuttable="what colour is it")
    assert words(tokenizer, plain.text(question, 20)[0]) == "<s>what colour is it</s>"
    assert words(tokenizer, plain.text(example("hello"), None)[0]).startswith("<s>[Subs] hello")


def test_a_long_target_keeps_its_end(tokenizer):
    whole = TextEncoder(tokenizer).target("something blue moves a green thing", None)
    assert whole[-1] == tokenizer.eos_token_id
    assert TextEncoder(tokenizer).target("something blue moves a green thing", 4) == [*whole[:3], whole[-1]]


def test_nothing_is_longer_than_the_model_has_positions(tokenizer, dataset, tmp_path):
    config = load_config(VideoConfig, "tiny", ["--model.path", str(dataset / "model")], recipes=RECIPES)
    assert text_encoder(config, tokenizer).num_positions == 256
    odd = {**json.loads((dataset / "model" / "config.json").read_text()), "max_position_embeddings": 95}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    odd_one = load_config(VideoConfig, "tiny", ["--model.path", str(tmp_path)], recipes=RECIPES)
    assert text_encoder(odd_one, tokenizer).num_positions == 88  # which rows of 88 tokens are padded to
    limited = TextEncoder(tokenizer, num_positions=90)
    for asked in (None, 150):
        ids, cut = limited.text(example("hello there it is red" * 200), asked)
        assert cut and len(ids) == 90 and words(tokenizer, ids).endswith(AFTER + "</s>")
        assert len(limited.target("something blue moves a green thing" * 200, asked)) == 90
    assert len(limited.text(example("hello there it is red" * 200), 60)[0]) == 60
    with pytest.raises(RecordError, match="Shorten or remove the row"):
        limited.text(example("hello", AFTER * 10), None)


def test_the_vocabulary_grows_by_two_hundred_once(tokenizer, dataset, tmp_path):
    vocabulary = tokenizer.get_vocab()
    assert len(EXTRA_TOKENS) == 200 and all(token in vocabulary for token in EXTRA_TOKENS)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(ModelSection(path=str(dataset / "model"), tokenizer=str(tmp_path))).get_vocab() == vocabulary
