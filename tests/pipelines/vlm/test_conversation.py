from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from pipelines.vlm.conversation import SYSTEM, RowError, images_of, render, render_question, turns_of

PARTS_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>\n{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (  # shows the last turn only, as templates do that drop earlier thoughts
    "{% for m in messages[-2:] %}{{ m['role'] }}|{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}assistant|{% endif %}"
)


def row(*turns: str, image: str | list[str] | None = "a.jpg", first: str = "human") -> dict:
    speakers = [first, "gpt" if first == "human" else "human"]
    talk = [{"from": speakers[place % 2], "value": value} for place, value in enumerate(turns)]
    return {"id": "7", **({"image": image} if image else {}), "conversations": talk}


@pytest.fixture
def tokenizer(tokenizer_folder):
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


def answers(rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.answers]


def test_the_vicuna_template_is_llavas_to_the_letter(tokenizer):
    rendered = render(row("<image>\nWhat is it?", "A bus", "Its colour?", "Red"), 1, "v1", tokenizer)
    assert rendered.text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A bus</s>"
        "USER: Its colour? ASSISTANT: Red</s>"
    )
    assert answers(rendered) == [" A bus</s>", " Red</s>"]


def test_a_single_image_moves_to_the_front_of_its_turn_wherever_it_stood(tokenizer):
    for question in ("<image>\nWhat?", "What?\n<image>", "What<image>?"):
        assert " USER: <image>\nWhat? ASSISTANT:" in render(row(question, "x"), 1, "v1", tokenizer).text


def test_several_images_stay_where_the_text_has_them(tokenizer):
    text = render(row("Is <image> like <image>?", "yes", image=["a.jpg", "b.jpg"]), 2, "v1", tokenizer).text
    assert " USER: Is <image> like <image>? ASSISTANT: yes</s>" in text


def test_the_plain_template_is_image_and_answer_alone(tokenizer):
    rendered = render(row("Describe it.\n<image>", "A red bus."), 1, "plain", tokenizer)
    assert rendered.text == "<image>A red bus.\n"
    assert answers(rendered) == ["A red bus.\n"]


def test_an_answer_begins_where_generation_would_in_every_template(tokenizer):
    for template, chat in (("v1", None), ("plain", None), ("chat", CHATML), ("chat", PARTS_TEMPLATE)):
        tokenizer.chat_template = chat
        rendered = render(row("<image>\nWhat?", "A bus"), 1, template, tokenizer)
        asked = render_question("What?", 1, template, tokenizer)
        assert rendered.text[: rendered.answers[0][0]] == asked.text
        assert rendered.adds_special_tokens == asked.adds_special_tokens


def test_chat_templates_keep_end_tokens_in_the_loss_and_line_breaks_out_of_it(tokenizer):
    tokenizer.chat_template = CHATML
    rendered = render(row("<image>\nWhat?", "A bus", "And?", "Red"), 1, "chat", tokenizer)
    assert answers(rendered) == ["A bus<|im_end|>", "Red<|im_end|>"]
    assert rendered.text.startswith("<|im_start|>user\n<image>\nWhat?<|im_end|>\n")


def test_a_chat_template_made_for_parts_is_given_parts(tokenizer):
    tokenizer.chat_template = PARTS_TEMPLATE
    rendered = render(row("<image>What?", "A bus"), 1, "chat", tokenizer)
    assert rendered.text == "USER: <image>\nWhat?ASSISTANT: A bus</s>"
    assert answers(rendered) == ["A bus</s>"]


def test_a_chat_template_that_changes_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(ValueError, match=r"renders a turn differently.*Use data\.template: v1"):
        render(row("a", "b", "c", "d", image=None), 0, "chat", tokenizer)


def test_the_chat_template_must_exist(tokenizer):
    with pytest.raises(ValueError, match=r"no chat template\. Use data\.template: v1"):
        render(row("a", "b", image=None), 0, "chat", tokenizer)


def test_text_alone_has_no_image(tokenizer):
    rendered = render(row("Hello", "Hi", image=None), 0, "v1", tokenizer)
    assert rendered.text == f"{SYSTEM} USER: Hello ASSISTANT: Hi</s>"


def test_a_first_answer_and_a_last_question_are_left_out():
    assert turns_of(row("Hi", "Q", "A", first="gpt", image=None), 0) == [("Q", "A")]
    assert turns_of(row("Q", "A", "Q2", image=None), 0) == [("Q", "A")]


@pytest.mark.parametrize(
    ("bad", "num_images", "message"),
    [
        ({"conversations": "hello"}, 0, "conversations is a str"),
        ({}, 0, "conversations is a NoneType"),
        ({"conversations": []}, 0, "nobody"),
        ({"conversations": [{"from": "human", "value": "Q"}]}, 0, "nobody"),
        ({"conversations": [{"from": "user", "value": "Q"}]}, 0, 'is not {"from": "human" or "gpt"'),
        ({"conversations": [{"from": "human", "value": None}]}, 0, "value"),
        (row("Q", "A"), 1, "stands 0 times in the first turn"),
        (row("<image><image>", "A"), 1, "stands 2 times in the first turn"),
        (row("<image>", "A", image=None), 0, r"once per image \(0\)"),
        (row("<image>", "A <image>"), 1, "1 times after it"),
    ],
)
def test_a_malformed_row_says_what_is_wrong_with_it(bad, num_images, message):
    with pytest.raises(RowError, match=message):
        turns_of(bad, num_images)


def test_two_turns_by_one_speaker_are_refused():
    talk = [{"from": who, "value": "x"} for who in ("human", "human", "gpt", "gpt")]
    with pytest.raises(RowError, match="must alternate"):
        turns_of({"conversations": talk}, 0)


def test_the_image_field_is_a_path_a_list_or_absent():
    assert images_of({}) == []
    assert images_of({"image": None}) == []
    assert images_of({"image": "a.jpg"}) == ["a.jpg"]
    assert images_of({"image": ["a.jpg", "b.jpg"]}) == ["a.jpg", "b.jpg"]
    for bad in (3, "", [1], [""], {"path": "a"}):
        with pytest.raises(RowError, match="a path, a list of paths or absent"):
            images_of({"image": bad})
