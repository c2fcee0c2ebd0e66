"""What an evaluator is, and what it is told about the run that calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dora_core.evaluation.results import Metric


@dataclass(frozen=True, kw_only=True)
class EvaluationContext:
    """What ``predict`` may use: the model, the settings, and this process's place among the ranks."""

    model: Any
    tokenizer: Any
    section: Any
    """The pipeline's section of evaluation settings."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else this pipeline's evaluators need, such as the prompt template or an image processor."""
    config_hash: str = ""
    """Hash of the settings that can change a score; written into every metric."""
    rank: int = 0
    world_size: int = 1
    synced: bool = False
    """Parameters are partitioned over the ranks (ZeRO-3): all of them must make the same forward calls."""
    device: Any = None
    """Where inputs go; None means the device of the model's parameters."""


class Evaluator(Protocol):
    """One benchmark. The runner calls ``load``, ``predict`` on this rank's share, and ``score`` on everything."""

    @property
    def name(self) -> str:
        """The registry name, such as ``llm/boolq``."""
        ...

    def load(self, section: Any) -> list[dict[str, Any]]:
        """Return all rows to score, the same on every rank; raises ``ValueError`` if they are missing or malformed."""
        ...

    def predict(self, rows: list[dict[str, Any]], context: EvaluationContext) -> list[dict[str, Any]]:
        """Return one plain JSON record per row, in order.

        Every rank calls it, also with no rows. Where ``context.synced`` is set, the number of forward calls must not
        depend on the rank: see ``runner.equal_calls``.
        """
        ...

    def score(self, predictions: list[dict[str, Any]]) -> list[Metric]:
        """Return the metrics of all rows' predictions, first the one to report; the runner adds hashes and commit.

        None at all if the answers are not known here, as with those that a server keeps.
        """
        ...


@runtime_checkable
class FileWriter(Protocol):
    """What an evaluator may offer besides: files for other programs and servers."""

    def write_files(self, predictions: list[dict[str, Any]], folder: Path, context: EvaluationContext) -> None:
        """Write the evaluator's own files, such as submissions, into the results folder.

        Called on rank 0 alone, after ``score``, with all predictions. What it raises is raised on every rank.
        """
        ...
