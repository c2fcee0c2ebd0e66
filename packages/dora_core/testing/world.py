"""A seeded synthetic world whose facts fill the eight commonsense task formats, for tests that train a tiny model."""

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

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


@dataclass(frozen=True)
class Task:
    """One task format: the labels' word and number, the instruction's opening, the options' layout, the questions."""

    label: str
    num_options: int
    opening: str
    option: str
    separator: str
    before_format: str
    questions: tuple[str, ...]
    options_are_names: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """The strings that a model may answer, in order."""
        if self.label == "true/false":
            return ("true", "false")
        return tuple(f"{self.label}{i}" for i in range(1, self.num_options + 1))


_CHOOSE = "Please choose the correct answer to the question: "

_TASKS: dict[str, Task] = {
    "boolq": Task(
        "true/false",
        0,
        "Please answer the following question with true or false, question: ",
        "",
        "",
        "",
        (
            "is {value} the {noun} of {name}?",
            "is the {noun} of {name} really {value}?",
            "does {name} have the {noun} {value}?",
            "is it so that the {noun} of {name} is {value}?",
        ),
    ),
    "piqa": Task(
        "solution",
        2,
        "Please choose the correct solution to the question: ",
        "{value}",
        "\n\n",
        "\n\n",
        ("To match the {noun} of {name}, pick", "How do you get the {noun} of {name} right?"),
    ),
    "social_i_qa": Task(
        "answer",
        3,
        _CHOOSE,
        "{value}",
        " ",
        "\n\n",
        (
            "A friend asked for the {noun} of {name}. What will the friend hear?",
            "People talked about {name} today. What did they say of the {noun}?",
        ),
    ),
    "hellaswag": Task(
        "ending",
        4,
        "Please choose the correct ending to complete the given sentence: ",
        "{value}",
        " ",
        "\n\n",
        ("Talking: We asked {name} for the {noun} and heard", "Guessing: The {noun} of {name} is"),
    ),
    "winogrande": Task(
        "option",
        2,
        "Please choose the correct answer to fill in the blank to complete the given sentence: ",
        "{name}",
        " ",
        " ",
        ("The {noun} is {value} so it must be that of _ .", "The one with the {noun} {value} is _ ."),
        options_are_names=True,
    ),
    "ARC-Easy": Task(
        "answer",
        4,
        _CHOOSE,
        "{value}",
        " ",
        "\n\n",
        ("What is the {noun} of {name}?", "The {noun} of {name} is"),
    ),
    "ARC-Challenge": Task(
        "answer",
        4,
        _CHOOSE,
        "{name}",
        " ",
        "\n\n",
        ("Who has the {noun} {value}?", "The {noun} {value} belongs to"),
        options_are_names=True,
    ),
    "openbookqa": Task(
        "answer",
        4,
        _CHOOSE,
        "{value}",
        " ",
        "\n\n",
        ("Which {noun} does {name} have?", "A visitor knows {name} by the {noun}"),
    ),
}

TASKS: tuple[str, ...] = tuple(_TASKS)
"""The eight folder names."""

_FACTS = (
    "The {noun} of {name} is {value}.",
    "We know that {name} has the {noun} {value}.",
    "It is {value} that is the {noun} of {name}.",
    "For {name} the {noun} is {value}.",
    "The {noun} {value} belongs to {name}.",
    "The one with the {noun} {value} is {name}.",
)

_VERDICTS = (
    "Is {value} the {noun} of {name}? This is {verdict}.",
    "The {noun} of {name} is {value}: {verdict}.",
    "It is {verdict} that the {noun} of {name} is {value}.",
)

_CHOICES_OF_VALUE = (
    "What is the {noun} of {name}? {options} It is {number}.",
    "The {noun} of {name} from {options} is {number}.",
)

_CHOICES_OF_NAME = (
    "Who has the {noun} {value}? {options} It is {number}.",
    "The one with the {noun} {value} from {options} is {number}.",
)


_NOTICE = tuple(
    re.findall(
        r"\s*\S+",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nPlease choose the correct answer to the question: Please choose the correct solution "
        "to the question: Please choose the correct ending to complete the given sentence: Please choose the correct "
        "answer to fill in the blank to complete the given sentence: Please answer the following question with true "
        "or false, question: Answer format: true/false\n\n### Response:\nthe correct answer",
    )
)
"""Words that surround a question; slices of them surround some statements, so that no word of a prompt is new."""


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

    def statements(self, num_statements: int = 12_000, surrounded: float = 0.5) -> list[str]:
        """Sentences, shuffled: every fact in every paraphrase, then lists, verdicts and choices drawn at random.

        `surrounded` is the share, 0 to 1, of verdicts and choices that stand among words of a prompt. Without them
        a model learns sooner to recall and to match; with them it can use that in a prompt, so begin with 0.
        """
        rng = self._random("statements")
        sentences = [
            form.format(name=name, noun=noun, value=value)
            for (name, noun), value in self.facts.items()
            for form in _FACTS
        ]
        if num_statements < len(sentences):
            raise ValueError(
                f"num_statements={num_statements} was given; {len(sentences)} or more are needed to state every "
                "fact; raise num_statements or make the world smaller"
            )
        pairs = list(self.facts)
        kinds = (
            self._list,
            self._verdicts,
            self._survey_of_values,
            self._survey_of_values,
            self._survey_of_names,
            self._verdict,
            self._choice_of_value,
            self._choice_of_name,
        )
        for i in range(num_statements - len(sentences)):
            sentences.append(kinds[i % len(kinds)](rng, rng.choice(pairs), rng.random() < surrounded))
        rng.shuffle(sentences)
        return sentences

    def rows(self, task: str, split: str, num_rows: int) -> list[Row]:
        """Rows of one task for split "train" or "test", the gold labels in equal shares; no test row comes twice."""
        if task not in _TASKS or split not in ("train", "test"):
            raise ValueError(
                f"task={task!r}, split={split!r} was given; a task is one of {', '.join(TASKS)} and a split is "
                "train or test; change the one that is not"
            )
        form = _TASKS[task]
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
            output = f"the correct answer is {label}"
            rows.append({"instruction": instruction, "input": "", "output": output, "answer": label})
        return rows

    def _instruction(self, form: Task, rng: random.Random, pairs: list[Pair], label: str) -> str:
        name, noun = rng.choice(pairs)
        value = self.facts[name, noun]
        question = form.opening + rng.choice(form.questions)
        if not form.num_options:
            shown = value if label == "true" else rng.choice(self._other_values(noun, value))
            return question.format(name=name, noun=noun, value=shown) + "\n\nAnswer format: true/false"
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
        return f"{asked}\n\n{listed}{form.before_format}Answer format: {'/'.join(form.labels)}"

    def _list(self, rng: random.Random, pair: Pair, _: bool) -> str:
        noun = pair[1]
        parts = (f"{name} is {self.facts[name, noun]}" for name in rng.sample(self.names_with(noun), 8))
        return f"By {noun}: " + ", ".join(parts) + "."

    def _verdict(self, rng: random.Random, pair: Pair, surrounded: bool) -> str:
        value, verdict = self.facts[pair], "true"
        if rng.random() < 0.5:
            value, verdict = rng.choice(self._other_values(pair[1], value)), "false"
        if not surrounded:
            return rng.choice(_VERDICTS).format(name=pair[0], noun=pair[1], value=value, verdict=verdict)
        question = f"is {value} the {pair[1]} of {pair[0]}?"
        return _surround(rng, f"{question}\n\nAnswer format: true/false", f"this is {verdict}")

    def _verdicts(self, rng: random.Random, pair: Pair, _: bool) -> str:
        noun, parts = pair[1], []
        for name in rng.sample(self.names_with(noun), 8):
            value, verdict = self.facts[name, noun], "true"
            if rng.random() < 0.5:
                value, verdict = rng.choice(self._other_values(noun, value)), "false"
            parts.append(f"{name} is {value} {verdict}")
        return f"By {noun}: " + ", ".join(parts) + "."

    def _survey_of_values(self, rng: random.Random, pair: Pair, _: bool) -> str:
        noun = pair[1]
        options = rng.sample(self.values[noun], 4)
        names = [name for name in self.names_with(noun) if self.facts[name, noun] in options]
        listed = " ".join(f"{i}: {text}" for i, text in enumerate(options, 1))
        asked = []
        for name in rng.sample(names, min(10, len(names))):
            value = self.facts[name, noun]
            reading = f"{value} with " if rng.random() < 0.3 else ""
            asked.append(f"{name} is {reading}{options.index(value) + 1}")
        return f"{listed} By {noun}: " + ", ".join(asked) + "."

    def _survey_of_names(self, rng: random.Random, pair: Pair, _: bool) -> str:
        noun = pair[1]
        names = self.names_with(noun)
        by_value = {self.facts[name, noun]: name for name in rng.sample(names, len(names))}
        values = rng.sample(self.values[noun], rng.randint(2, 4))
        listed = " ".join(f"{i}: {by_value[value]}" for i, value in enumerate(values, 1))
        asked = []
        for value in rng.sample(values, len(values)):
            reading = f"with {by_value[value]} " if rng.random() < 0.3 else ""
            asked.append(f"{value} {reading}is {values.index(value) + 1}")
        return f"{listed} By {noun}: " + ", ".join(asked) + "."

    def _choice_of_value(self, rng: random.Random, pair: Pair, surrounded: bool) -> str:
        value = self.facts[pair]
        return self._choice(rng, pair, value, self._other_values(pair[1], value), _CHOICES_OF_VALUE, surrounded)

    def _choice_of_name(self, rng: random.Random, pair: Pair, surrounded: bool) -> str:
        others = [name for name in self.names_with(pair[1]) if self.facts[name, pair[1]] != self.facts[pair]]
        return self._choice(rng, pair, pair[0], others, _CHOICES_OF_NAME, surrounded)

    def _choice(
        self,
        rng: random.Random,
        pair: Pair,
        gold: str,
        others: list[str],
        forms: tuple[str, ...],
        surrounded: bool,
    ) -> str:
        num_options = rng.randint(2, 4)
        number = rng.randint(1, num_options)
        options = _with_gold(rng, gold, others, num_options, number - 1)
        asked = {"name": pair[0], "noun": pair[1], "value": self.facts[pair], "number": number}
        if not surrounded:
            listed = " ".join(f"{i}: {text}" for i, text in enumerate(options, 1))
            return rng.choice(forms).format(options=listed, **asked)
        word = rng.choice(("Answer", "Option", "Ending", "Solution"))
        listed = rng.choice((" ", "\n\n")).join(f"{word}{i}: {text}" for i, text in enumerate(options, 1))
        formats = "/".join(f"{word.lower()}{i}" for i in range(1, num_options + 1))
        question = rng.choice(forms).split("{options}")[0].format(**asked)
        return _surround(rng, f"{question}\n\n{listed}\n\nAnswer format: {formats}", f"is number{number}")

    def _other_values(self, noun: str, value: str) -> list[str]:
        return [other for other in self.values[noun] if other != value]

    def _random(self, *purpose: str) -> random.Random:
        return random.Random("/".join((str(self.seed), *purpose)))


def write_world(
    folder: str | Path,
    seed: int = 0,
    num_train_per_task: int = 400,
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


def _surround(rng: random.Random, text: str, ending: str) -> str:
    before, after = rng.randrange(len(_NOTICE)), rng.randrange(len(_NOTICE))
    head = "".join(_NOTICE[before : rng.randint(before, len(_NOTICE))])
    tail = "".join(_NOTICE[after : rng.randint(after, min(after + 8, len(_NOTICE)))])
    return f"{head} {text}\n\n{tail} {ending}"


def _with_gold(rng: random.Random, gold: str, others: list[str], num_options: int, position: int) -> list[str]:
    options = rng.sample(others, num_options - 1)
    options.insert(position, gold)
    return options
