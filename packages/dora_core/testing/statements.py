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


def _verdicts(world: World, rng: random.Random, pair: Pair) -> str:
    noun, parts = pair[1], []
    for name in rng.sample(world.names_with(noun), 8):
        value, verdict = _perhaps_false(world, rng, (name, noun))
        parts.append(f"{name} is {value} {verdict}")
    return f"By {noun}: " + ", ".join(parts) + "."


def _values_to_numbers(world: World, rng: random.Random, pair: Pair) -> str:
    noun = pair[1]
    options = rng.sample(world.values[noun], 4)
    asked = []
    for name in rng.sample(world.names_with(noun), 8):
        asked.append(f"{name} is number{options.index(world.facts[name, noun]) + 1}")
    return f"{_options(rng, options)} By {noun}: " + ", ".join(asked) + "."


def _names_to_numbers(world: World, rng: random.Random, pair: Pair) -> str:
    noun = pair[1]
    names = world.names_with(noun)
    by_value = {world.facts[name, noun]: name for name in rng.sample(names, len(names))}
    values = rng.sample(world.values[noun], rng.randint(2, 4))
    asked = [f"{value} is number{values.index(value) + 1}" for value in rng.sample(values, len(values))]
    return f"{_options(rng, [by_value[value] for value in values])} By {noun}: " + ", ".join(asked) + "."


def _verdict(world: World, rng: random.Random, pair: Pair) -> str:
    value, verdict = _perhaps_false(world, rng, pair)
    question = rng.choice(_VERDICTS).format(name=pair[0], noun=pair[1], value=value)
    return _in_a_prompt(rng, question, f"this is {verdict}")


def _choice_of_value(world: World, rng: random.Random, pair: Pair) -> str:
    options = rng.sample(world.values[pair[1]], 4)
    options = _cut(rng, options, world.facts[pair])
    question = rng.choice(_OF_NAME).format(name=pair[0], noun=pair[1])
    return _choice(rng, question, options, world.facts[pair])


def _choice_of_name(world: World, rng: random.Random, pair: Pair) -> str:
    value = world.facts[pair]
    others = [name for name in world.names_with(pair[1]) if world.facts[name, pair[1]] != value]
    options = [pair[0], *rng.sample(others, rng.randint(1, 3))]
    rng.shuffle(options)
    return _choice(rng, rng.choice(_OF_VALUE).format(noun=pair[1], value=value), options, pair[0])


_KINDS = (
    _list,
    _verdicts,
    _values_to_numbers,
    _names_to_numbers,
    _verdict,
    _choice_of_value,
    _choice_of_value,
    _choice_of_name,
)


def _choice(rng: random.Random, question: str, options: list[str], gold: str) -> str:
    return _in_a_prompt(rng, f"{question}\n\n{_options(rng, options)}", f"this is number{options.index(gold) + 1}")


def _cut(rng: random.Random, options: list[str], gold: str) -> list[str]:
    kept = {gold, *rng.sample([option for option in options if option != gold], rng.randint(1, len(options) - 1))}
    return [option for option in options if option in kept]


def _options(rng: random.Random, options: list[str]) -> str:
    word = rng.choice(_WORDS)
    return rng.choice((" ", " ", "\n\n")).join(f"{word}{i}: {text}" for i, text in enumerate(options, 1))


def _perhaps_false(world: World, rng: random.Random, pair: Pair) -> tuple[str, str]:
    value = world.facts[pair]
    if rng.random() < 0.5:
        return value, "right"
    return rng.choice([other for other in world.values[pair[1]] if other != value]), "wrong"


def _in_a_prompt(rng: random.Random, text: str, ending: str) -> str:
    """Put some phrases of a prompt, drawn at random, around a text."""
    before = rng.choice(("", BEFORE)) + rng.choice(("", *OPENINGS)) + " "
    after = rng.choice(("", "\n\n" + rng.choice(FORMATS))) + rng.choice(("\n\n", RESPONSE))
    return f"{before}{text}{after}{ending}"
