"""How far a run has come: everything that must survive a restart beside weights, optimizer and random state."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field


@dataclass
class Progress:
    """Counts at the end of an optimizer step; ``step`` is also the data cursor, since row order follows from it."""

    step: int = 0
    num_tokens: int = 0
    """Real tokens of all ranks, padding left out."""
    num_targets: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """What else a pipeline counts, such as rows, images and rows that could not be read."""
    best_loss: float | None = None
    """Lowest validation loss so far."""
    best_step: int | None = None

    def advance(self, num_tokens: float, num_targets: float, **counts: float) -> None:
        """Count one optimizer step; ``counts`` are its own, of all ranks."""
        self.step += 1
        self.num_tokens += int(num_tokens)
        self.num_targets += int(num_targets)
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + int(count)

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
