"""What is said and asked about clips: subtitles, questions with choices, captions; and how well one can guess."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from dora_core.testing.clips import (
    ALONE,
    BASIC,
    BEAT_S,
    COLOURS,
    NUM_BEATS,
    SHAPES,
    TOGETHER,
    WAYS,
    Clip,
    Seen,
    make_clip,
    named_clip,
)

KINDS = ("motion", "still", "speech")
"""What it takes to answer a question: several frames, one frame, or the subtitles."""
MOMENT = f"0.00-{NUM_BEATS * BEAT_S:.2f}"
"""The time of every question: the whole clip, in seconds."""
FOODS = ("tea", "milk", "rice", "soup", "bread")
PETS = ("cat", "dog", "bird", "fish")
LINES = ("Ann: I like {food}.", "Bob: I have a {pet}.", "Eve: Look at this.")
"""What is said in every clip, in any order."""
NUM_CAPTIONS = 4
"""Ways to put one caption."""

Spoken = Mapping[str, str]
"""The food and the pet that are spoken of."""


class Question(NamedTuple):
    """A wording, its kind, the choices in their fixed order, and the right one of them."""

    kind: str
    text: str
    choices: tuple[str, ...]
    answer: str


class Wording(NamedTuple):
    """What is asked about the clips of one source that show one of the deeds, and what the answer is."""

    kind: str
    text: str
    choices: tuple[str, ...]
    deeds: tuple[str, ...]
    answer: Callable[[Clip, Spoken], str]


_WAYS = (*WAYS, "nowhere")
_LACKS = (*BASIC, "none")
_ALL = (*ALONE, *TOGETHER)
_ONE, _TWO = tuple(ALONE), tuple(TOGETHER)

WORDINGS: dict[str, tuple[Wording, ...]] = {
    "tv": (
        Wording("motion", "Which way does it go?", _WAYS, ("goes", "stays"), lambda clip, _: clip.way or "nowhere"),
        Wording(
            "motion", "Where does it turn round?", _WAYS, ("turns", "stays"), lambda clip, _: clip.way or "nowhere"
        ),
        Wording(
            "still", "What colour is it at the end?", tuple(COLOURS), _ONE, lambda clip, _: clip.things[0].colours[-1]
        ),
        Wording("speech", "What does Ann like?", FOODS, _ALL, lambda _, spoken: spoken["food"]),
    ),
    "how2": (
        Wording("motion", "Which colour does it never show?", _LACKS, _ONE, lambda clip, _: clip.missing),
        Wording("motion", "What do the two do?", _TWO, _TWO, lambda clip, _: clip.deed),
        Wording("still", "What shape is it?", SHAPES, _ONE, lambda clip, _: clip.things[0].shape),
        Wording(
            "still", "What shape is the left one at the start?", SHAPES, _TWO, lambda clip, _: clip.things[0].shape
        ),
        Wording("speech", "What does Bob have?", PETS, _ALL, lambda _, spoken: spoken["pet"]),
    ),
}
"""By source, all that is asked; TVQA has five choices and How2QA four."""
TASKS = {"tv": "tvqa", "how2": "how2qa"}


def draw_spoken(rng: random.Random) -> dict[str, str]:
    """Draw what is spoken of; nothing that is seen has a part in it."""
    return {"food": rng.choice(FOODS), "pet": rng.choice(PETS)}


def subtitles(spoken: Spoken, rng: random.Random) -> list[dict[str, Any]]:
    """Return the lines of speech in any order, with start and end in seconds."""
    length = NUM_BEATS * BEAT_S / len(LINES)
    lines = []
    for place, line in enumerate(rng.sample(LINES, len(LINES))):
        start = place * length + rng.randint(0, 10) / 10
        lines.append({"text": line.format(**spoken), "start": round(start, 2), "end": round(start + 2.5, 2)})
    return lines


def questions(source: str, clip: Clip, spoken: Spoken) -> list[Question]:
    """Return all that can be asked about a clip of a source; nothing where no questions belong to the source."""
    return [
        Question(one.kind, one.text, one.choices, one.answer(clip, spoken))
        for one in WORDINGS.get(source, ())
        if clip.deed in one.deeds
    ]


def captions(clip: Clip) -> list[str]:
    """Return ``NUM_CAPTIONS`` wordings of what happens in a clip."""
    if clip.deed in TOGETHER:
        one, other = (f"{thing.colours[0]} {thing.shape}" for thing in clip.things)
        names = (f"a {one} and a {other}", f"the {one} and the {other}")
        return [
            f"{names[0]} {clip.deed}",
            f"{names[1]} {clip.deed}",
            f"here {names[0]} {clip.deed}",
            f"we see that {names[0]} {clip.deed}",
        ]
    thing = clip.things[0]
    first, last = thing.colours[0], thing.colours[-1]
    deed = {"goes": f"goes {clip.way}", "turns": f"goes {clip.way} and comes back", "stays": "stays"}[clip.deed]
    change = f" and becomes {last}" if last != first else ""
    return [
        f"a {first} {thing.shape} {deed}{change}",
        f"the {first} {thing.shape} {deed}{change}",
        f"here a {first} {thing.shape} {deed}{change}",
        f"we see that a {first} {thing.shape} {deed}{change}",
    ]


def _choices(one: Wording, task: str) -> str:
    return " [Choices] " + " ".join(f"a{place}: {text}." for place, text in enumerate(one.choices)) + f" {task}: "


_SPOKEN = [part for line in LINES for part in re.split(r"\{\w+\}", line) if len(part) > 1]
PHRASES = tuple(
    dict.fromkeys(
        (
            "[Subs] ",
            " [Q] ",
            " [TS] (",
            ") [Choices] a0: ",
            *(f". a{place}: " for place in range(1, 5)),
            *(f". {task}: " for task in TASKS.values()),
            f" [TS] ([0.0, {NUM_BEATS * BEAT_S}]) tvc: ",
            " yc2c: ",
            *(f"a{place}" for place in range(5)),
            *_SPOKEN,
            *(f" [Q] {one.text} [TS] ({MOMENT})" for asked in WORDINGS.values() for one in asked),
            *(_choices(one, TASKS[source]) for source, asked in WORDINGS.items() for one in asked),
        )
    )
)
"""What is the same in many prompts; as single tokens they make a prompt short enough for a tiny model.

Where choices stand in their fixed order, a question is one token and its choices another.
"""


def blind_level(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of question rows that the most frequent answer to each wording gets right."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row["q"]][_answer(row)] += 1
    return sum(max(answers.values()) for answers in counts.values()) / len(rows)


def one_frame_level(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> float:
    """Return the share of question rows that the best guess from a single frame gets right.

    For each wording the guess is made at the beat, and from the view of what is seen there, that tell most about the
    answer in a large sample of the world; it is the most frequent answer in that sample to what is seen, or to the
    wording if that was never seen. ``seed`` is the seed of the world from which the rows are.
    """
    right = 0
    for row in rows:
        guess = _guess(row["vid_name"].split("_")[0], row["q"])
        seen = named_clip(row["vid_name"], seed).seen(guess.beat)
        right += guess.answers.get(guess.view(seen), guess.usual) == _answer(row)
    return right / len(rows)


def _answer(row: Mapping[str, Any]) -> str:
    return row[f"a{row['answer_idx']}"]


View = Callable[[tuple[Seen, ...]], Any]
_VIEWS: tuple[View, ...] = (
    lambda seen: tuple((one.column, one.row) for one in seen),
    lambda seen: tuple(one.colour for one in seen),
    lambda seen: tuple(one.shape for one in seen),
    lambda seen: tuple((one.column, one.row, one.colour) for one in seen),
    lambda seen: seen,
)
"""Parts of a frame, then all of it: of less, a sample shows better what it tells."""
_NUM_SAMPLED = 12_000


class _Guess(NamedTuple):
    beat: int
    view: View
    answers: dict[Any, str]
    usual: str


@cache
def _sample(source: str) -> list[tuple[Clip, dict[str, str]]]:
    rng = random.Random(f"sample of {source}")
    clips = (make_clip(source, number, rng) for number in range(_NUM_SAMPLED))
    return [(clip, {one.text: one.answer for one in questions(source, clip, draw_spoken(rng))}) for clip in clips]


@cache
def _guess(source: str, text: str) -> _Guess:
    """Learn guesses from two thirds of the sample and choose the best beat and view by the rest."""
    asked = [(clip, answers[text]) for clip, answers in _sample(source) if text in answers]
    usual = Counter(answer for _, answer in asked).most_common(1)[0][0]
    parts = asked[len(asked) // 3 :], asked[: len(asked) // 3]
    best, most = _Guess(0, _VIEWS[0], {}, usual), -1
    for beat in range(NUM_BEATS):
        frames = [[(clip.seen(beat), answer) for clip, answer in part] for part in parts]
        for view in _VIEWS:
            counts: dict[Any, Counter[str]] = defaultdict(Counter)
            for seen, answer in frames[0]:
                counts[view(seen)][answer] += 1
            answers = {state: found.most_common(1)[0][0] for state, found in counts.items()}
            right = sum(answers.get(view(seen), usual) == answer for seen, answer in frames[1])
            if right > most:
                best, most = _Guess(beat, view, answers, usual), right
    return best
