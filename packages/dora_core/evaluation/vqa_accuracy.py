"""VQA accuracy: how far an open answer agrees with several annotators, normalised as LLaVA or as VL-BART does it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

FULL_AGREEMENT = 3
"""An answer that this many of the other annotators gave is entirely right."""

MARKS = ';/[]"{}()=+\\_-><@`!,?'
"""Deleted or made spaces."""
DIGIT_COMMA = re.compile(r"\d,\d")
UNPROTECTED_FULL_STOP = re.compile(r"\.(?!\d)")
MAX_FULL_STOPS = 32
"""More full stops than this stay: the official code passes the flag ``re.UNICODE``, 32, where the count belongs."""
ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
"""The words that the official table spells out; entries of its own that cannot match (capitals) or change nothing are
left out."""


def _with_one_apostrophe_dropped(words: Sequence[str]) -> dict[str, str]:
    return {
        word[:place] + word[place + 1 :]: word for word in words for place, letter in enumerate(word) if letter == "'"
    }


CONTRACTIONS = _with_one_apostrophe_dropped(CONTRACTED.split()) | {"somebody'd": "somebodyd"}
"""Misspelled word to its correction; the last entry is the wrong way round in the official table, and here."""


@lru_cache(maxsize=2**16)
def normalize_answer(text: str) -> str:
    """Return ``text`` as the EvalAI normaliser of LLaVA's VQAv2, VizWiz and TextVQA scoring leaves it.

    Its oddities are kept, so that scores are comparable. A mark is deleted everywhere if it touches a space anywhere
    in the text, and is made a space otherwise. A full stop stays only before a digit: a misspelt lookbehind makes what
    precedes it irrelevant. The official rule on a comma between digits cannot apply, since commas go first.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _join_words(_without_marks(_one_line(text)))


@lru_cache(maxsize=2**16)
def normalize_prediction(text: str) -> str:
    """Return a predicted answer as the official VQA toolkit leaves it, whose copy scores VL-BART.

    Like ``normalize_answer``, but commas, question marks and ``'s`` are not treated first. So a comma or a question
    mark is one of the marks, and a comma between digits has all marks deleted.
    """
    return _join_words(_without_marks(_one_line(text)).lower())


def answer_scores(answers: Sequence[str]) -> dict[str, float]:
    """Return the accuracy in [0, 1] of each normalised answer that an annotator gave; any other answer has 0.

    Each annotator is left out in turn: an answer then scores min(1, number of the others who gave it / 3), and the
    accuracy is the mean. Usually there are 10 annotators, so that 1, 2, 3 and 4 of them make 0.3, 0.6, 0.9 and 1.
    With fewer than 4, "3" becomes the number of the others, so that unanimity is worth 1; an only annotator is not
    left out. Raises ``ValueError`` for none.
    """
    _require_answers(answers)
    counts = Counter(normalize_answer(answer) for answer in answers)
    if len(answers) == 1:
        return dict.fromkeys(counts, 1.0)
    return _left_out_in_turn(counts, min(FULL_AGREEMENT, len(answers) - 1))


def toolkit_scores(answers: Sequence[str]) -> dict[str, float]:
    """Return the accuracy in [0, 1] of each annotator's answer as the official toolkit leaves it: ``toolkit_accuracy``.

    Raises ``ValueError`` for none.
    """
    _require_answers(answers)
    counts = Counter(answers if len(set(answers)) == 1 else map(_without_marks, answers))
    return _left_out_in_turn(counts, FULL_AGREEMENT)


def toolkit_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy in [0, 1] of ``prediction`` as the official VQA toolkit counts it, whose copy scores VL-BART.

    The toolkit's oddities are kept. The prediction is normalised in full, of the annotators' answers only marks and
    full stops, and not even those if all ten are the same: no prediction agrees with an annotator's "two" or "the
    dog". Each annotator is left out in turn, and 3 of the others are always needed for full agreement, so that fewer
    than 4 annotators cannot give 1. Raises ``ValueError`` for no answers.
    """
    return toolkit_scores(answers).get(normalize_prediction(prediction), 0.0)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of ``prediction`` against the annotators' ``answers``, all normalised: ``answer_scores``."""
    return answer_scores(answers).get(normalize_answer(prediction), 0.0)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(text: str) -> str:
    has_digit_comma = DIGIT_COMMA.search(text) is not None
    cleaned = text
    for mark in MARKS:
        deleted = has_digit_comma or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if deleted else " ")
    return UNPROTECTED_FULL_STOP.sub("", cleaned, count=MAX_FULL_STOPS)


def _join_words(text: str) -> str:
    """Return ``text`` with digits for number words, without articles, and with apostrophes where they belong."""
    words = (DIGITS.get(word, word) for word in text.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _require_answers(answers: Sequence[str]) -> None:
    if not answers:
        raise ValueError("There are 0 reference answers; VQA accuracy needs at least one. Leave the question out.")


def _left_out_in_turn(counts: Counter[str], needed: int) -> dict[str, float]:
    """Return each answer's mean over the annotators of min(1, number of the others who gave it / needed)."""
    num = counts.total()
    return {
        answer: (count * min(1.0, (count - 1) / needed) + (num - count) * min(1.0, count / needed)) / num
        for answer, count in counts.items()
    }
