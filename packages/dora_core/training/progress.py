"""How far a run has come: everything that must survive a restart beside weights, optimizer and random state."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass
class Progress:
    """Counts at the end of an optimizer step; ``step`` is also the data cursor, since row order follows from it."""

    step: int = 0
    num_tokens: int = 0
    """Real tokens of all ranks, padding left out."""
    num_targets: int = 0
    num_rows: int = 0
    """Rows read, bad ones included; 0 in pipelines whose rows are all checked before the run."""
    num_bad_rows: int = 0
    best_loss: float | None = None
    """Lowest validation loss so far."""
    best_step: int | None = None

    def advance(self, num_tokens: float, num_targets: float, *, num_rows: float = 0, num_bad_rows: float = 0) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.num_tokens += int(num_tokens)
        self.num_targets += int(num_targets)
        self.num_rows += int(num_rows)
        self.num_bad_rows += int(num_bad_rows)

    def note_validation(self, loss: float) -> None:
        """Remember the step if its validation loss is the lowest; one that is not finite never is."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step = loss, self.step

    def due(self, every: int | None, num_steps: int) -> bool:
        """Whether something done every so many steps, and at the end, is due now."""
        return self.step == num_steps or (every is not None and self.step % every == 0)

    def to_json(self) -> dict:
        """Return plain data."""
        return asdict(self)
