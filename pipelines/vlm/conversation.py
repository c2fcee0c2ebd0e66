"""Conversations in LLaVA's layout to text, with the places that carry loss: Vicuna's template, plain, the model's own.

A row has ``conversations``, turns ``{"from": "human" | "gpt", "value": text}`` in alternation, and perhaps ``image``: a
path or a list of paths, one for each ``<image>`` in its first human turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import TemplateError

IMAGE_MARK = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class RowError(ValueError):
    """One row cannot be used; the message says why."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """Spans [start, end) of characters with loss: all that the model has to write, end tokens too."""
    adds_special_tokens: bool = True
    """Whether the tokenizer adds its own, such as BOS; a chat template writes them itself."""


def images_of(row: Mapping[str, Any]) -> list[str]:
    """Return the paths of the row's images, none for text alone. Raises ``RowError`` for anything else."""
    given = row.get("image")
    images = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(images, list) or not all(isinstance(path, str) and path for path in images):
        raise RowError(f"image is {str(given)[:80]!r}; it must be a path, a list of paths or absent. Correct the row.")
    return images


def turns_of(row: Mapping[str, Any], num_images: int) -> list[tuple[str, str]]:
    """Return the row's (question, answer) pairs, checked.

    An answer before the first question and a question without an answer at the end are left out, as LLaVA does.
    Raises ``RowError`` for another shape and unless ``<image>`` stands ``num_images`` times in the first question and
    nowhere else.
    """
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise RowError(f"conversations is a {type(turns).__name__}; it must be a list of turns. Correct the row.")
    for turn in turns:
        if (
            not isinstance(turn, dict)
            or turn.get("from") not in ("human", "gpt")
            or not isinstance(turn.get("value"), str)
        ):
            raise RowError(
                f'The turn {str(turn)[:80]!r} is not {{"from": "human" or "gpt", "value": text}}. Correct the row.'
            )
    turns = turns[1:] if turns and turns[0]["from"] == "gpt" else turns
    turns = turns[:-1] if len(turns) % 2 else turns
    speakers = [turn["from"] for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise RowError(f"The turns are by {speakers or 'nobody'}; human and gpt must alternate. Correct the row.")
    counts = [turn["value"].count(IMAGE_MARK) for turn in turns]
    if counts[0] != num_images or any(counts[1:]):
        raise RowError(
            f"{IMAGE_MARK} stands {counts[0]} times in the first turn and {sum(counts[1:])} times after it; it must "
            f"stand once per image ({num_images}) in the first. Correct the row's text or its images."
        )
    return [(turns[place]["value"], turns[place + 1]["value"]) for place in range(0, len(turns), 2)]


def render(row: Mapping[str, Any], num_images: int, template: str, tokenizer: Any) -> Rendered:
    """Return the row's text and its spans with loss; the end token and the chat template are the tokenizer's.

    v1: Vicuna's, as LLaVA-1.5 was trained; a single ``<image>`` moves to the front of its turn, on a line of its own.
    plain: image and answer alone, for training the projector. chat: the tokenizer's chat template, the text as it is.
    """
    turns = turns_of(row, num_images)
    if template == "v1":
        return _render_v1(turns, tokenizer.eos_token)
    if template == "plain":
        start = IMAGE_MARK * num_images
        text = start + turns[0][1] + "\n"
        return Rendered(text, ((len(start), len(text)),))
    return _render_chat(turns, tokenizer)


def render_question(question: str, num_images: int, template: str, tokenizer: Any) -> Rendered:
    """Return the text that an answer to ``question`` goes on from; images stand before the question."""
    question = f"{IMAGE_MARK}\n" * num_images + question
    if template == "v1":
        return Rendered(f"{SYSTEM} USER: {_image_first(question)} ASSISTANT:", ())
    if template == "plain":
        return Rendered(IMAGE_MARK * num_images, ())
    return Rendered(_chat(tokenizer, [(question, None)]), (), adds_special_tokens=False)


def _render_v1(turns: Sequence[tuple[str, str]], end: str) -> Rendered:
    text, answers = SYSTEM + " ", []
    for place, (question, answer) in enumerate(turns):
        text += f"USER: {question if place else _image_first(question)} ASSISTANT:"
        start = len(text)
        text += f" {answer}{end}"
        answers.append((start, len(text)))
    return Rendered(text, tuple(answers))


def _image_first(question: str) -> str:
    if question.count(IMAGE_MARK) != 1:
        return question
    return f"{IMAGE_MARK}\n{question.replace(IMAGE_MARK, '').strip()}"


def _render_chat(turns: Sequence[tuple[str, str]], tokenizer: Any) -> Rendered:
    """Find each answer as what the text has beyond the conversation up to it with its generation prompt."""
    text = _chat(tokenizer, turns)
    answers = []
    for place, (question, answer) in enumerate(turns):
        before = _chat(tokenizer, [*turns[:place], (question, None)])
        whole = _chat(tokenizer, turns[: place + 1])
        if not (whole.startswith(before) and text.startswith(whole)):
            raise RowError(
                "The tokenizer's chat template renders a turn differently once the conversation goes on, so the "
                f"answers cannot be found: {before[-60:]!r} is no beginning of {text[:200]!r}. Use data.template: v1, "
                "or a tokenizer with another chat template."
            )
        # without the line break that many templates put after their end token
        answers.append((len(before), max(len(whole.rstrip()), len(before) + len(answer))))
    return Rendered(text, tuple(answers), adds_special_tokens=False)


def _chat(tokenizer: Any, turns: Sequence[tuple[str, str | None]]) -> str:
    """Return the conversation by the tokenizer's chat template, up to the answer that is None."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "data.template is chat, but the tokenizer has no chat template. Use data.template: v1, or set "
            "model.tokenizer to a folder that has one."
        )
    as_parts = _takes_parts(tokenizer)
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": _parts(question) if as_parts else question})
        if answer is not None:
            messages.append({"role": "assistant", "content": _parts(answer) if as_parts else answer})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=turns[-1][1] is None)
    except TemplateError as error:
        raise RowError(f"The tokenizer's chat template refuses the row: {error}. Use data.template: v1.") from None


@cache
def _takes_parts(tokenizer: Any) -> bool:
    """Whether the template shows nothing of a message given as text: it is written for lists of parts."""
    probe = [{"role": "user", "content": "probe"}]
    return "probe" not in tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)


def _parts(text: str) -> list[dict[str, str]]:
    pieces = text.split(IMAGE_MARK)
    parts: list[dict[str, str]] = []
    for place, piece in enumerate(pieces):
        parts += [{"type": "text", "text": piece}] * bool(piece)
        parts += [{"type": "image"}] * (place < len(pieces) - 1)
    return parts
