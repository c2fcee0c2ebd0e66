"""Rows of several tasks as tokens and what they see, made as they are needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from dora_core.data.rows import DataError
from dora_core.data.store import RowStore
from dora_core.media.images import ImageError
from pipelines.video import tasks  # noqa: F401 (fills the table of tasks)
from pipelines.video.config import DataSection, TaskSection
from pipelines.video.decode import VideoError
from pipelines.video.encode import TextEncoder
from pipelines.video.looking import Look, Seen
from pipelines.video.task import Annotations, Example, RecordError, Split, Task, get_task
from pipelines.video.visual import VisualError

NUM_PROBED = 8
"""Rows of each task that are read before a run begins."""


@dataclass(frozen=True)
class TaskRow:
    """One row of a task: tokens of text and target, the weight of the target, and what is seen."""

    task: int
    text_ids: list[int]
    target_ids: list[int]
    weight: float
    seen: tuple[Seen, ...]
    truncated: bool


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    where: str
    reason: str


@dataclass(frozen=True)
class TaskData:
    """A task's annotations of one split, and its training rows."""

    task: Task
    records: RowStore
    annotations: Annotations
    places: np.ndarray
    """Of each row the record and the target, int64 ``[rows, 2]``; the target is -1 where one is drawn each epoch."""
    num_without_target: int
    """Annotations that are no rows, since they have no answer of any weight."""

    def example(self, place: int) -> Example:
        """Return the example that a row is of."""
        return self.task.checked_example(self.records[int(self.places[place, 0])], self.annotations)


class TaskRows:
    """Rows of all tasks, one after the other, by draw: ``epoch * num_rows + row``; a row's target is drawn by it."""

    def __init__(self, data: Sequence[TaskData], encoder: TextEncoder, look: Look, seed: int) -> None:
        self._data = list(data)
        self._starts = [0, *accumulate(len(each.places) for each in data)]
        self._encoder = encoder
        self._look = look
        self._seed = seed

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[TaskRow | BadRow]:
        return (self[row] for row in range(len(self)))  # of one epoch: there is a draw for every number

    def __getitem__(self, draw: int) -> TaskRow | BadRow:
        epoch, row = divmod(draw, len(self))
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        data, place = self._data[number], row - self._starts[number]
        try:
            example = data.example(place)
            text, weight = self._target(example, int(data.places[place, 1]), epoch, row)
            ids, truncated = self._encoder.text(example, data.task.max_text_length)
            seen = tuple(map(self._look.read, example.visuals))
            target = self._encoder.target(text, data.task.max_target_length)
            return TaskRow(number, ids, target, weight, seen, truncated)
        except (RecordError, VisualError, VideoError, ImageError, DataError, OSError) as error:
            record = data.records[int(data.places[place, 0])]
            return BadRow(f"{data.task.name} {record.get(data.task.id_field, place)}", str(error))

    def _target(self, example: Example, target: int, epoch: int, row: int) -> tuple[str, float]:
        if target >= 0:
            return example.targets[target]
        weights = np.array([weight for _, weight in example.targets])
        generator = np.random.default_rng([self._seed, epoch, row])
        return example.targets[generator.choice(len(weights), p=weights / weights.sum())]


@dataclass(frozen=True)
class DataReport:
    """What was found; rows are read, and bad ones counted, during training."""

    num_rows: dict[str, int]
    """Training rows by task."""
    num_without_target: int
    num_validation: int
    epoch_size: int
    dataset_hash: str
    """Over annotations, features and all settings that shape rows; media are not read, nor is the tokenizer."""


def the_tasks(section: DataSection) -> list[Task]:
    """Return the tasks of a recipe with the recipe's changes. Raises ``ValueError`` for an unknown one."""
    found = []
    for entry in section.tasks:
        given = TaskSection(name=entry) if isinstance(entry, str) else entry
        names = ("batch_ratio", "max_text_length", "max_target_length")
        changes = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
        found.append(replace(get_task(given.name), **changes))
    return found


def collections_of(data: Sequence[TaskData]) -> list[str]:
    """Return the collections whose pictures or videos the first row of each task, and of its splits, shows."""
    return sorted({visual.partition("/")[0] for each in data for visual in each.example(0).visuals})


def read_task(task: Task, root: str, split: Split) -> TaskData:
    """Return a task's rows. Raises ``DataError`` for missing files, ``RecordError`` for an annotation of wrong form."""
    records, annotations = task.read(root, split)
    places: list[tuple[int, int]] = []
    num_without = num_spoken = 0
    for number, record in enumerate(records):
        example = task.checked_example(record, annotations)
        weights = [weight for _, weight in example.targets]
        num_spoken += bool(example.cuttable)
        num_without += not sum(weights)
        if sum(weights):
            places += [(number, -1)] if task.draws_target else [(number, place) for place in range(len(weights))]
    if not places:
        raise DataError(
            f"The task {task.name} has no {split} annotation with an answer; at least one is needed. Check "
            f"{', '.join(task.files[split])} in {root}."
        )
    if task.subtitles and not num_spoken:
        raise DataError(
            f"No video of the task {task.name} has subtitles in {task.subtitles}; some must. Its vid_name must be "
            f"those of {', '.join(task.files[split])}."
        )
    return TaskData(task, RowStore(records), annotations, np.array(places), num_without)


def load_data(section: DataSection, seed: int) -> tuple[list[TaskData], list[TaskData]]:
    """Return the training rows and the validation rows, none unless asked for, of every task; same on every rank."""
    wanted = the_tasks(section)
    train = [read_task(task, section.path, "train") for task in wanted]
    held = []
    for task in wanted if section.num_validation else []:
        data = read_task(task, section.path, "val")
        order = np.random.default_rng([seed, len(held)]).permutation(len(data.places))
        held.append(replace(data, places=data.places[np.sort(order[: section.num_validation])]))
    return train, held


def report_on(section: DataSection, train: Sequence[TaskData], held: Sequence[TaskData], look: Look) -> DataReport:
    """Return the report on a run's data."""
    shaping = ("task_prompts", "reference_truncation", "num_validation")
    lengths = [[each.task.max_text_length, each.task.max_target_length, each.task.batch_ratio] for each in train]
    parts = [[each.records.sha256, _text_hash(each.annotations.subtitles)] for each in (*train, *held)]
    known = [parts, lengths, [getattr(section, name) for name in shaping], look.sha256]
    num_rows = {each.task.name: len(each.places) for each in train}
    return DataReport(
        num_rows=num_rows,
        num_without_target=sum(each.num_without_target for each in train),
        num_validation=sum(len(each.places) for each in held),
        epoch_size=sum(num_rows.values()),
        dataset_hash=hashlib.sha256(json.dumps(known).encode()).hexdigest(),
    )


def probe(rows: TaskRows, data: Sequence[TaskData]) -> None:
    """Read a few rows of each task: a wrong folder of features should not wait for the first steps to be noticed."""
    start = 0
    for each in data:
        places = np.unique(np.linspace(0, len(each.places) - 1, NUM_PROBED).astype(int))
        found = [rows[start + int(place)] for place in places]
        bad = [row for row in found if isinstance(row, BadRow)]
        if len(bad) == len(found):
            raise DataError(
                f"The task {each.task.name}: none of {len(found)} rows tried can be used; the first is {bad[0].where}: "
                f"{bad[0].reason} Check data.path and data.visual."
            )
        start += len(each.places)


def _text_hash(texts: object) -> str:
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
