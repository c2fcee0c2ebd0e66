"""The eight commonsense task formats as the synthetic world fills them, and the phrases of their prompts."""

from dataclasses import dataclass


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

    @property
    def answer_format(self) -> str:
        """The instruction's last line."""
        return "Answer format: " + "/".join(self.labels)


_CHOOSE = "Please choose the correct answer to the question:"

TASKS: dict[str, Task] = {
    "boolq": Task(
        "true/false",
        0,
        "Please answer the following question with true or false, question:",
        "",
        "",
        "\n\n",
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
        "Please choose the correct solution to the question:",
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
        "Please choose the correct ending to complete the given sentence:",
        "{value}",
        " ",
        "\n\n",
        ("Talking: We asked {name} for the {noun} and heard", "Guessing: The {noun} of {name} is"),
    ),
    "winogrande": Task(
        "option",
        2,
        "Please choose the correct answer to fill in the blank to complete the given sentence:",
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
"""Folder name -> format."""

BEFORE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)
RESPONSE = "\n\n### Response:\n"
OUTPUT = "the correct answer is"
OPENINGS = tuple(dict.fromkeys(task.opening for task in TASKS.values()))
FORMATS = tuple(dict.fromkeys(task.answer_format for task in TASKS.values()))

PHRASES = (BEFORE, RESPONSE, OUTPUT, *OPENINGS, *FORMATS)
"""What is the same in every prompt. As single tokens they make a prompt a quarter as long, which a tiny model needs."""
