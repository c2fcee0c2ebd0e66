"""What is said and asked about scenes: captions for pre-training, questions in LLaVA's wording with true answers."""

from __future__ import annotations

import random
from collections.abc import Callable

from dora_core.testing.scenes import FIGURES, Scene, options, perhaps

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
INSUFFICIENT = "When the provided information is insufficient, respond with 'Unanswerable'."
OCR = "Reference OCR token:"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PHRASES = (
    f"{SYSTEM} USER: ",
    "USER: ",
    " ASSISTANT:",
    f"\n{INSUFFICIENT}\n{SHORT}",
    f"\n{SHORT}",
    f"\n{LETTER}",
    f"\n{OCR}",
    "unanswerable",
)
"""What is the same in many prompts; as single tokens they make a prompt short enough for a tiny model."""
UNANSWERABLE = "unanswerable"
NUM_OPTIONS = (2, 3)
_CHOSEN = ("colour", "shape", "number")
_QUESTIONS = {
    "colour": ("What colour is it?", "Which colour do you see?"),
    "shape": ("What shape is it?", "Which shape do you see?"),
    "number": ("How many are there?", "What number of them is there?"),
    "size": ("What size is it?", "Is it small or big?"),
    "place": ("Where is it?", "At which place is it?"),
}

Asked = tuple[str, str]
"""A question without the sentence on the answer's form, and the answer."""
Choice = tuple[str, list[str], int]
"""A question, its options, and the place of the right one."""


def caption(scene: Scene, rng: random.Random, num_remarks: int = 4) -> str:
    """Return what is in the scene, among remarks of other kinds in any order.

    The remarks make the forms that answers take familiar (a value is there or not, the letter of the right option);
    none has the form of a question that the benchmarks ask.
    """
    place = f" at the {scene.value('place')}" if "place" in scene.attributes else ""
    whole = f"{scene.value('number')} {scene.size} {scene.colour} {scene.shape}{place}."
    remarks = [rng.choice((_verdict, _absence, _label, _label))(scene, rng) for _ in range(num_remarks)]
    parts = [*remarks, whole]
    rng.shuffle(parts)
    return " ".join(parts)


def open_question(scene: Scene, rng: random.Random) -> Asked:
    """Ask for any attribute, or whether the colour is some colour."""
    if rng.random() < 0.3:
        colour, right = perhaps(scene, "colour", rng)
        return f"Is it {colour}?", "yes" if right else "no"
    return _ask(scene, rng, scene.attributes)


def attribute_question(scene: Scene, rng: random.Random) -> Asked:
    """Ask for any attribute but the number."""
    return _ask(scene, rng, tuple(name for name in scene.attributes if name != "number"))


def doubtful_question(scene: Scene, rng: random.Random) -> Asked:
    """Ask for the colour of a shape that may not be there."""
    shape, right = perhaps(scene, "shape", rng, share=0.7)
    return f"What colour is the {shape}?", scene.colour if right else UNANSWERABLE


def presence_question(scene: Scene, rng: random.Random) -> Asked:
    """Ask whether a shape is there, as POPE does."""
    shape, right = perhaps(scene, "shape", rng)
    return f"Is there a {shape} in the image?", "yes" if right else "no"


def reading_question(scene: Scene, rng: random.Random) -> tuple[Asked, list[str]]:
    """Ask which letter is shown; the second value is what a reader of text claims to have seen, the letter among it."""
    seen, _ = options(scene, "shape", rng, rng.choice(NUM_OPTIONS))
    return (rng.choice(("What letter is it?", "Which letter do you see?")), scene.shape), seen


def choice_question(scene: Scene, rng: random.Random, number: int) -> Choice:
    """Ask for an attribute with ``number`` options."""
    attribute = rng.choice(_CHOSEN)
    return rng.choice(_QUESTIONS[attribute]), *options(scene, attribute, rng, number)


def word_question(rng: random.Random) -> Choice:
    """Ask something that needs no picture."""
    place = rng.randrange(2)
    values = [rng.choice(FIGURES)]
    values.insert(place, rng.choice(("red", "green", "blue", "pink")))
    return "Which of these is a colour?", values, place


def listed(question: str, values: list[str]) -> str:
    """Return a question with its options as lines `A. …`."""
    return question + "".join(f"\n{letter}. {value}" for letter, value in zip("ABCD", values, strict=False))


def _ask(scene: Scene, rng: random.Random, attributes: tuple[str, ...]) -> Asked:
    attribute = rng.choice(attributes)
    return rng.choice(_QUESTIONS[attribute]), scene.value(attribute)


def _verdict(scene: Scene, rng: random.Random) -> str:
    value, right = perhaps(scene, rng.choice(("shape", "colour")), rng)
    return f"{value}? {'yes' if right else 'no'}."


def _absence(scene: Scene, rng: random.Random) -> str:
    shape, right = perhaps(scene, "shape", rng)
    return f"{shape} is {scene.colour if right else 'absent'}."


def _label(scene: Scene, rng: random.Random) -> str:
    values, place = options(scene, rng.choice(_CHOSEN), rng, rng.choice(NUM_OPTIONS))
    return " ".join(f"{letter}. {value}" for letter, value in zip("ABCD", values, strict=False)) + f" {'ABCD'[place]}."


def _as_chosen(choice: Choice) -> Asked:
    question, values, place = choice
    return listed(question, values), "ABCD"[place]


def _read(scene: Scene, rng: random.Random) -> Asked:
    (question, answer), seen = reading_question(scene, rng)
    return f"{question}\n{OCR} {', '.join(seen)}", answer


TALKS: tuple[tuple[Callable[[Scene, random.Random], Asked], str], ...] = (
    (open_question, SHORT),
    (attribute_question, SHORT),
    (doubtful_question, f"{INSUFFICIENT}\n{SHORT}"),
    (lambda scene, rng: _as_chosen(choice_question(scene, rng, rng.choice(NUM_OPTIONS))), LETTER),
    (_read, SHORT),
    (presence_question, SHORT),
    (open_question, SHORT),
    (lambda scene, rng: _as_chosen(choice_question(scene, rng, max(NUM_OPTIONS))), LETTER),
)
"""The kinds of questions of instruction rows, each with the sentence on the answer's form; one row asks one kind."""


def talk(kind: int, scene: Scene, rng: random.Random, num_turns: int = 4) -> list[Asked]:
    """Return a conversation about a scene, ``TALKS[kind]`` in every turn."""
    ask, form = TALKS[kind]
    asked = (ask(scene, rng) for _ in range(num_turns))
    return [(f"{question}\n{form}", answer) for question, answer in asked]


def wordy_talk(rng: random.Random, num_turns: int = 4) -> list[Asked]:
    """Return a conversation that needs no picture."""
    asked = (_as_chosen(word_question(rng)) for _ in range(num_turns))
    return [(f"{question}\n{LETTER}", answer) for question, answer in asked]


def needs_letters(kind: int) -> bool:
    """Whether ``TALKS[kind]`` asks about letters alone."""
    return TALKS[kind][0] is _read
