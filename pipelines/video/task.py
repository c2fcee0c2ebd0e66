"""What a task is: annotations, what each becomes, and how it is trained on. The tasks themselves are in ``tasks.py``.

Importing this module must stay cheap (no torch): the evaluators do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Record = dict[str, Any]
"""One annotation, as its file has it."""
Split = Literal["train", "val", "test"]


class RecordError(ValueError):
    """An annotation cannot be used; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An annotation as the model meets it: what it sees, what it reads, and what it may be taught to write."""

    id: int | str
    visuals: tuple[str, ...]
    """Pictures or videos, each ``<collection>/<name>``: which features to look up."""
    before: str = ""
    cuttable: str = ""
    """What is cut, from its end, if the text is too long: the subtitles, or a question's own words."""
    after: str = ""
    """The text is ``before + cuttable + after``."""
    targets: tuple[tuple[str, float], ...] = ()
    """Texts to learn with the weight of each; none where the answer is not known."""

    def to_json(self) -> Record:
        """Return the example as plain JSON values."""
        return {**asdict(self), "visuals": list(self.visuals), "targets": [list(each) for each in self.targets]}

    @classmethod
    def from_json(cls, row: Record) -> Example:
        """Return the example of what ``to_json`` made; other fields of ``row`` are left aside."""
        own = {each.name: row[each.name] for each in fields(cls)}
        return cls(**{**own, "visuals": tuple(own["visuals"]), "targets": tuple(map(tuple, own["targets"]))})


@dataclass(frozen=True)
class Annotations:
    """What a task's function is told besides the annotation."""

    split: Split
    subtitles: Mapping[str, str] = field(default_factory=dict)
    """By video, its lines of speech joined by spaces."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Where a task's annotations are, what each becomes, and how a batch of them is made and weighed."""

    name: str
    files: Mapping[str, tuple[str, ...]]
    """By split, under the folder of all data."""
    example: Callable[[Record, Annotations], Example]
    """Raises ``KeyError``, ``TypeError`` or ``RecordError`` for an annotation that cannot be used."""
    id_field: str
    max_text_length: int | None
    """In tokens, those at both ends included."""
    max_target_length: int | None
    batch_ratio: float = 1.0
    """Rows of this task's batches over ``train.global_batch_size``."""
    draws_target: bool = False
    """One of the targets is drawn for each epoch, in proportion to its weight; else each target is a training row."""
    loss_per: Literal["row", "token"] = "row"
    """row: the mean over a row's tokens, times its target's weight, then the mean over rows; token: over all tokens."""
    subtitles: str | None = None
    """File of the videos' speech."""
    records: Callable[[Path, str], Iterable[Record]] | None = None
    """Reads a file of another form than a list or lines of annotations."""

    def read(self, root: str | Path, split: Split) -> tuple[list[Record], Annotations]:
        """Return the annotations of a split, unchanged, and what ``example`` is to be told; raises ``DataError``."""
        from dora_core.data.rows import DataError

        try:
            return self._read(Path(root), split)
        except DataError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"The task {self.name} cannot read the annotations in {root} ({type(error).__name__}: {error}); they "
                f"must have the form that their publisher gave them. Download {self.all_files(split)} again."
            ) from error

    def all_files(self, split: Split) -> str:
        """Return the names of the files of a split, in words."""
        return " and ".join(filter(None, (*self.files[split], self.subtitles)))

    def _read(self, root: Path, split: Split) -> tuple[list[Record], Annotations]:
        from dora_core.data.rows import DataError, read_rows

        records: list[Record] = []
        for name in self.files[split]:
            if not (root / name).is_file():
                raise DataError(
                    f"The task {self.name} has no {split} annotations: {root / name} is not a file. The folder of all "
                    f"data must hold {', '.join(self.files[split])}. Put the file there or name another folder."
                )
            records += self.records(root / name, split) if self.records else read_rows(str(root / name))
        subtitles = _read_subtitles(root / self.subtitles) if self.subtitles else {}
        return records, Annotations(split, subtitles)

    def checked_example(self, record: Record, annotations: Annotations) -> Example:
        """Return the example of an annotation; raises ``RecordError``, which says which one and what is wrong."""
        try:
            example = self.example(record, annotations)
        except RecordError:
            raise
        except (KeyError, TypeError, AttributeError) as error:
            which = record.get(self.id_field, "without an id")
            what = f"has no {error}" if isinstance(error, KeyError) else f"does not have the form expected ({error})"
            raise RecordError(
                f"The {self.name} annotation {which} {what}; it has {', '.join(map(str, record))}. Correct it in "
                f"{' or '.join(self.files[annotations.split])}."
            ) from None
        if not isinstance(example.cuttable, str) or not all(
            isinstance(text, str) and isinstance(weight, int | float) and 0 <= weight < float("inf")
            for text, weight in example.targets
        ):
            raise RecordError(
                f"The {self.name} annotation {example.id} asks {example.cuttable!r} and has the answers "
                f"{example.targets!r}; a question must be a text, an answer a text with a number of 0 or more. Correct "
                f"it in {self.all_files(annotations.split)}."
            )
        return example


TASKS: dict[str, Task] = {}
"""By name; filled by ``task``."""


def task(**facts: Any) -> Callable[[Callable[[Record, Annotations], Example]], Callable]:
    """Make a task of the function below, under its name; ``facts`` are the other fields of ``Task``."""

    def add(function: Callable[[Record, Annotations], Example]) -> Callable:
        TASKS[function.__name__] = Task(name=function.__name__, example=function, **facts)
        return function

    return add


def get_task(name: str) -> Task:
    """Return the task called ``name``; an unknown one is an error with close matches."""
    from dora_core.registry import unknown_name

    if name not in TASKS:
        raise unknown_name("task", name, list(TASKS))
    return TASKS[name]


def _read_subtitles(path: Path) -> dict[str, str]:
    from dora_core.data.rows import read_rows

    return {row["vid_name"]: " ".join(line["text"] for line in row["sub"]) for row in read_rows(str(path))}
