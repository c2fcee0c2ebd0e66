"""Plain statements about a synthetic world: what a tiny model is pre-trained on before it meets a task."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from dora_core.testing.formats import BEFORE, FORMATS, OPENINGS, RESPONSE

if TYPE_CHECKING:
    from dora_core.testing.world import Pair, World

_FACTS = (
    "The {noun} of {name} is {value}.",
    "We know that {name} has the {noun} {value}.",
    "It is {value} that is the {noun} of {name}.",
    "For {name} the {noun} is {value}.",
    "The {noun} {value} belongs to {name}.",
    "The one with the {noun} {value} is {name}.",
)
_VERDICTS = ("Is {value} the {noun} of {name}?", "The {noun} of {name} is {value}.", "Has {name} the {noun} {value}?")
_OF_NAME = ("What is the {noun} of {name}?", "The {noun} of {name} from these.", "For {name} the {noun} is")
_OF_VALUE = ("Who has the {noun} {value}?", "The one with the {noun} {value} from these.", "The {noun} {value} is of")
_WORDS = ("Answer", "Option", "Ending", "Solution")


def make_statements(world: World, num_statements: int, rng: random.Random) -> list[str]:
    """Return sentences, shuffled: every fact in every paraphrase, then lists, verdicts and choices drawn at random.

    Many stand among phrases of a prompt, so that no word of one is new to the model, but none is answered as a task
    asks for: a choice ends with ``number3`` and a verdict with ``right`` or ``wrong``. Raises ValueError for fewer
    statements than it takes to state every fact.
    """
    sentences = [
        form.format(name=name, noun=noun, value=value) for (name, noun), value in world.facts.items() for form in _FACTS
    ]
    if num_statements < len(sentences):
        raise ValueError(
            f"num_statements={num_statements} was given; {len(sentences)} or more are needed to state every fact; "
            "raise num_statements or make the world smaller"
        )
    pairs = list(world.facts)
    for i in range(num_statements - len(sentences)):
        sentences.append(_KINDS[i % len(_KINDS)](world, rng, rng.choice(pairs)))
    rng.shuffle(sentences)
    return sentences


def _list(world: World, rng: random.Random, pair: Pair) -> str:
    noun = pair[1]
    parts = (f"{name} is {world.facts[name, noun]}" for name in rng.sample(world.names_with(noun), 8))
    return f"By {noun}: " + ", ".join(parts) + "."


def _verdict(world: World, rng: random.Random, pair: Pair) -> str:
    value, verdict = _perhaps_false(world, rng, pair)
    question = rng.choice(_VERDICTS).format(name=pair[0], noun=pair[1], value=value)
    return _in_a_prompt(rng, question, verdict)


def _choice_of_value(world: World, rng: random.Random, pair: Pair) -> str:
    values = rng.sample(world.values[pair[1]], rng.choice((2, 3, 4, 4)))
    if world.facts[pair] not in values:
        values[rng.randrange(len(values))] = world.facts[pair]
    question = rng.choice(_OF_NAME).format(name=pair[0], noun=pair[1])
    return _choice(world, rng, pair, question, values, values)


def _choice_of_name(world: World, rng: random.Random, pair: Pair) -> str:
    noun, value = pair[1], world.facts[pair]
    names = world.names_with(noun)
    by_value = {world.facts[name, noun]: name for name in rng.sample(names, len(names))} | {value: pair[0]}
    values = [value, *rng.sample([other for other in by_value if other != value], rng.choice((1, 2, 3, 3)))]
    rng.shuffle(values)
    question = rng.choice(_OF_VALUE).format(noun=noun, value=value)
    return _choice(world, rng, pair, question, values, [by_value[value] for value in values])


def _remark(world: World, rng: random.Random, pair: Pair) -> str:
    value, verdict = _perhaps_false(world, rng, pair)
    return f"It is {'true' if verdict == 'right' else 'false'} that the {pair[1]} of {pair[0]} is {value}."


_KINDS = (_list, _remark, *[_choice_of_value] * 3, _verdict, *[_choice_of_name] * 2)


def _choice(world: World, rng: random.Random, pair: Pair, question: str, values: list[str], options: list[str]) -> str:
    """Ask and answer a question; then say which numbers some other names and values have among the same options."""
    noun, value = pair[1], world.facts[pair]
    asked = sorted(values) + [name for name in world.names_with(noun) if world.facts[name, noun] in values]
    start = rng.randrange(len(asked))
    others = (asked * 2)[start : start + min(6, len(asked))]
    numbers = (f"{other}{values.index(world.facts.get((other, noun), other)) + 1}" for other in others)
    answer = f"number{values.index(value) + 1}. By {noun}: " + ", ".join(numbers) + "."
    return _in_a_prompt(rng, f"{question}\n\n{_options(rng, options)}", answer)


def _options(rng: random.Random, options: list[str]) -> str:
    word = rng.choice(_WORDS)
    return rng.choice((" ", " ", "\n\n")).join(f"{word}{i}: {text}" for i, text in enumerate(options, 1))


def _perhaps_false(world: World, rng: random.Random, pair: Pair) -> tuple[str, str]:
    value = world.facts[pair]
    if rng.random() < 0.5:
        return value, "right"
    return rng.choice([other for other in world.values[pair[1]] if other != value]), "wrong"


def _in_a_prompt(rng: random.Random, text: str, ending: str) -> str:
    """Put phrases of a prompt, drawn at random, around a text."""
    return f"{BEFORE}{rng.choice(OPENINGS)} {text}\n\n{rng.choice(FORMATS)}{RESPONSE}{ending}"
