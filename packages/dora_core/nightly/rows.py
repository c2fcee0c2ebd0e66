"""A line of the report: one metric of one entry, with its verdict and all that is shown of it."""

from __future__ import annotations

from dataclasses import dataclass

from dora_core.nightly.history import Past
from dora_core.nightly.measure import Measured, Outcome
from dora_core.nightly.plan import Planned

ORDER = ("broken", "red", "yellow", "grey", "green")
"""Verdicts, worst first."""
DATA, RUN = "data", "run"
"""Names of the lines on the training rows, and on a run that did not get to its end."""


@dataclass(frozen=True)
class Flip:
    """An example whose outcome changed."""

    index: int
    before: Outcome
    now: Outcome
    worse: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the report."""

    planned: Planned
    metric: str
    verdict: str
    reason: str
    value: float | None = None
    stderr: float | None = None
    n: int | None = None
    unit: str = ""
    reference: float | None = None
    band: float | None = None
    severity: float = 0.0
    """Orders rows of one verdict."""
    measured: Measured | None = None
    data_hash: str = ""
    notes: tuple[str, ...] = ()
    """What differs from the reference run: settings, versions."""
    trend: tuple[Past, ...] = ()
    """Earlier nights' values on the same hardware and data, oldest first."""
    flips: tuple[Flip, ...] = ()
