"""A seeded synthetic world whose facts fill the eight commonsense task formats, for tests that train a tiny model."""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dora_core.testing import formats
from dora_core.testing.statements import make_statements

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": ("red", "green", "blue", "pink", "white", "black", "brown", "grey"),
    "pet": ("cat", "dog", "goat", "duck", "mouse", "horse", "snake", "fish"),
    "meal": ("rice", "soup", "bread", "cheese", "beans", "eggs", "cake", "corn"),
    "tool": ("saw", "axe", "drill", "brush", "rope", "spade", "knife", "lamp"),
    "job": ("baker", "nurse", "pilot", "judge", "clerk", "miner", "poet", "guard"),
    "sport": ("tennis", "chess", "golf", "rugby", "judo", "skiing", "rowing", "darts"),
    "home": ("tent", "boat", "tower", "cabin", "farm", "castle", "cave", "hotel"),
    "mood": ("happy", "angry", "calm", "proud", "bored", "sad", "shy", "brave"),
}
"""Attribute noun -> its values; no word occurs twice, so a value tells its attribute."""

Row = dict[str, str]
Pair = tuple[str, str]
"""(entity name, attribute noun): the unit that is held out."""


TASKS: tuple[str, ...] = tuple(formats.TASKS)
"""The eight folder names."""


@dataclass(frozen=True)
class World:
    """Entities with one attribute and one value each; some (entity, attribute) pairs are kept for the test split.

    The attributes share the entities out evenly. Raises ValueError for a world too small to fill every format.
    """

    seed: int = 0
    num_entities: int = 24
    num_attributes: int = 2
    num_values: int = 4
    held_out_fraction: float = 1 / 3

    def __post_init__(self) -> None:
        per_attribute, odd = divmod(self.num_entities, max(1, self.num_attributes))
        num_held = round(self.held_out_fraction * per_attribute)
        limits = (
            ("num_attributes", self.num_attributes, 1, len(ATTRIBUTES)),
            ("num_values", self.num_values, 4, min(map(len, ATTRIBUTES.values()))),
            ("num_entities per attribute", per_attribute, 2 * self.num_values, 200),
            ("entities left over by num_attributes", odd, 0, 0),
            ("held-out entities per attribute", num_held, self.num_values, per_attribute - self.num_values),
        )
        for name, given, low, high in limits:
            if not low <= given <= high:
                raise ValueError(f"{name}: {given} was given; {low} to {high} is allowed; change the world's sizes")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The entities' names."""
        syllables = [first + vowel for first in "bdfklmnrtvz" for vowel in "aeiou"]
        pairs = [(first + second).capitalize() for first in syllables for second in syllables if first != second]
        return tuple(self._random("names").sample(pairs, self.num_entities))

    @cached_property
    def values(self) -> dict[str, tuple[str, ...]]:
        """Attribute noun -> the values that occur in this world."""
        nouns = list(ATTRIBUTES)[: self.num_attributes]
        return {noun: ATTRIBUTES[noun][: self.num_values] for noun in nouns}

    @cached_property
    def facts(self) -> dict[Pair, str]:
        """(name, noun) -> value; every value of an attribute is held by about equally many entities."""
        facts = {}
        for noun, values in self.values.items():
            names = self.names_with(noun)
            column = [values[i % len(values)] for i in range(len(names))]
            self._random("facts", noun).shuffle(column)
            facts.update({(name, noun): value for name, value in zip(names, column, strict=True)})
        return facts

    def names_with(self, noun: str) -> tuple[str, ...]:
        """The entities that have this attribute; the attributes share the entities out among them."""
        return self.names[list(self.values).index(noun) :: self.num_attributes]

    @cached_property
    def held_out(self) -> frozenset[Pair]:
        """The pairs that only test rows ask about."""
        held = set()
        for noun in self.values:
            names = self.names_with(noun)
            names = self._random("held", noun).sample(names, len(names))
            taken = dict.fromkeys(self.values[noun], 0)
            turns = {}
            for name in names:
                turns[name] = taken[self.facts[name, noun]]
                taken[self.facts[name, noun]] += 1
            num_held = round(self.held_out_fraction * len(names))
            held.update((name, noun) for name in sorted(names, key=turns.__getitem__)[:num_held])
        return frozenset(held)

    def statements(self, num_statements: int = 12_000) -> list[str]:
        """Sentences for pre-training, shuffled; every fact is stated. See ``make_statements``."""
        return make_statements(self, num_statements, self._random("statements"))

    def rows(self, task: str, split: str, num_rows: int) -> list[Row]:
        """Rows of one task for split "train" or "test", the gold labels in equal shares; no test row comes twice."""
        if task not in TASKS or split not in ("train", "test"):
            raise ValueError(
                f"task={task!r}, split={split!r} was given; a task is one of {', '.join(TASKS)} and a split is "
                "train or test; change the one that is not"
            )
        form = formats.TASKS[task]
        rng = self._random(task, split)
        pairs = [pair for pair in self.facts if (pair in self.held_out) == (split == "test")]
        labels = [form.labels[i % len(form.labels)] for i in range(num_rows)]
        rng.shuffle(labels)
        rows, seen = [], set()
        for label in labels:
            instruction = self._instruction(form, rng, pairs, label)
            for _ in range(1000):
                if split == "train" or instruction not in seen:
                    break
                instruction = self._instruction(form, rng, pairs, label)
            else:
                raise ValueError(f"{num_rows} test rows of {task} were asked for; {len(rows)} differ; ask for fewer")
            seen.add(instruction)
            output = f"{formats.OUTPUT} {label}"
            rows.append({"instruction": instruction, "input": "", "output": output, "answer": label})
        return rows

    def _instruction(self, form: formats.Task, rng: random.Random, pairs: list[Pair], label: str) -> str:
        name, noun = rng.choice(pairs)
        value = self.facts[name, noun]
        question = f"{form.opening} " + rng.choice(form.questions)
        if not form.num_options:
            shown = value if label == "true" else rng.choice(self._other_values(noun, value))
            return question.format(name=name, noun=noun, value=shown) + form.before_format + form.answer_format
        gold = form.labels.index(label)
        if form.options_are_names:
            others = [other for other, its in pairs if its == noun and self.facts[other, noun] != value]
            options = _with_gold(rng, name, others, form.num_options, gold)
        else:
            options = _with_gold(rng, value, self._other_values(noun, value), form.num_options, gold)
        listed = form.separator.join(
            f"{form.label.capitalize()}{i}: {form.option.format(name=text, value=text)}"
            for i, text in enumerate(options, 1)
        )
        asked = question.format(name=name, noun=noun, value=value)
        return f"{asked}\n\n{listed}{form.before_format}{form.answer_format}"

    def _other_values(self, noun: str, value: str) -> list[str]:
        return [other for other in self.values[noun] if other != value]

    def _random(self, *purpose: str) -> random.Random:
        return random.Random("/".join((str(self.seed), *purpose)))


def write_world(
    folder: str | Path,
    seed: int = 0,
    num_train_per_task: int = 1000,
    num_test_per_task: int = 40,
    num_statements: int = 12_000,
) -> World:
    """Write <task>/train.json, <task>/test.json, commonsense_mix.json and statements.json; return their world."""
    world = World(seed)
    folder = Path(folder)
    mix: list[Row] = []
    for task in TASKS:
        train = world.rows(task, "train", num_train_per_task)
        mix += train
        write_rows(folder / task / "train.json", train)
        write_rows(folder / task / "test.json", world.rows(task, "test", num_test_per_task))
    random.Random(f"{seed}/mix").shuffle(mix)
    write_rows(folder / "commonsense_mix.json", mix)
    statements = (
        {"instruction": "", "input": "", "output": text, "answer": ""} for text in world.statements(num_statements)
    )
    write_rows(folder / "statements.json", statements)
    return world


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as the data sets do: one JSON list, indented by four spaces, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows), indent=4, ensure_ascii=False), encoding="utf-8", newline="\n")


def _with_gold(rng: random.Random, gold: str, others: list[str], num_options: int, position: int) -> list[str]:
    options = rng.sample(others, num_options - 1)
    options.insert(position, gold)
    return options
