"""Questions with lettered options: how they are asked, how the letter is read, how they are counted."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dora_core.evaluation.results import Metric, accuracy_metric
from pipelines.vlm.evaluators.questions import Row

LETTERS = ("A", "B", "C", "D", "E")
LETTER_SENTENCE = "Answer with the option's letter from the given choices directly."
STATED_ANSWER = re.compile(r"The answer is ([A-Z]).")
"""As in LLaVA's script, where the full stop stands for any character but must be there."""


def ask(question: str, options: Sequence[str]) -> str:
    """Return the prompt: the question (with its context), one lettered line an option, the request for a letter."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, LETTER_SENTENCE])


def parse_letter(text: str, num_options: int) -> str | None:
    """Return the letter that ``text`` gives, or None; it must be one of the first ``num_options``.

    As in LLaVA's script: the text is a letter, or begins with one, a full stop and a space, or says "The answer is X."
    exactly once.
    """
    if text in LETTERS:
        letter = text
    elif len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        stated = STATED_ANSWER.findall(text)
        letter = stated[0] if len(stated) == 1 else None
    return letter if letter in LETTERS[:num_options] else None


def letter_of_option(text: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that ``text`` is, or of the only one whose words it contains, or None.

    Case, outer spaces and a final full stop do not count.
    """
    said, names = _plain(text), [_plain(option) for option in options]
    found = [place for place, name in enumerate(names) if name == said]
    if not found:
        found = [place for place, name in enumerate(names) if _contains(said, name)]
    return LETTERS[found[0]] if len(found) == 1 else None


def choice_metric(name: str, groups: Sequence[Sequence[Row]], *, metric: str = "accuracy") -> Metric:
    """Return the share of groups whose rows are all ``correct``.

    ``extra`` has what guessing and what the best single letter score, as groups, and how many answers gave no letter.
    """
    shares = {letter: _share([all(row["answer"] == letter for row in rows) for rows in groups]) for letter in LETTERS}
    best = max(LETTERS, key=lambda letter: shares[letter])
    extra: dict[str, Any] = {
        "chance": _share([math.prod(1 / len(row["options"]) for row in rows) for rows in groups]),
        "majority": shares[best],
        "majority_answer": best,
        "num_unparsed": sum(row["pred"] is None for rows in groups for row in rows),
    }
    return replace(
        accuracy_metric(name, [all(row["correct"] for row in rows) for rows in groups], extra=extra), metric=metric
    )


def _share(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").rstrip().lower()


def _contains(text: str, words: str) -> bool:
    return bool(words) and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None
