"""Rows that could not be read: counted over all ranks, written down, and too many of them end the run."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dora_core.data.rows import DataError
from dora_core.training.metrics import drop_rows_after
from dora_core.training.progress import Progress
from dora_core.training.run import Run

FILE = "bad_rows.jsonl"


class BadRows:
    """The bad rows of a run, in ``bad_rows.jsonl`` of its folder, and how many it may have.

    The limit is ``max_fraction`` of the rows of an epoch, or of those read once they are more, and one row unless
    ``max_fraction`` is 0: a folder that is missing ends a run within its first steps, and a single broken file does
    not. ``progress.counts`` must have ``num_rows`` and ``num_bad``.
    """

    def __init__(self, run: Run, progress: Progress, max_fraction: float, rows_per_epoch: int) -> None:
        self._run = run
        self._max_fraction = max_fraction
        self._rows_per_epoch = rows_per_epoch
        self._path = run.folder / FILE
        run.world.on_main(lambda: drop_rows_after(self._path, progress.step))

    def note(self, progress: Progress, num_new: float, bad: Sequence[tuple[str, str]]) -> None:
        """Write down the bad rows of the step that ``progress`` has counted: (which, why) of each on this rank.

        Every rank must call it; ``num_new`` is their number over all ranks. Raises ``DataError`` on all ranks if the
        run has more than it may.
        """
        if not num_new:
            return
        shares = self._run.world.gather(list(bad))
        rows = [{"step": progress.step, "row": where, "reason": why} for share in shares for where, why in share]
        self._run.world.on_main(lambda: self._write(rows))
        num_bad, num_rows = progress.counts["num_bad"], progress.counts["num_rows"]
        allowed = self._max_fraction * max(self._rows_per_epoch, num_rows)
        allowed = max(allowed, 1.0) if self._max_fraction else 0.0
        if num_bad > allowed:
            raise DataError(
                f"{num_bad} of {num_rows} rows read by step {progress.step} cannot be used; "
                f"data.max_bad_fraction {self._max_fraction:g} allows {int(allowed)}. {self._path} lists them; the "
                f"latest is {rows[-1]['row']}: {rows[-1]['reason']} Repair the data or raise data.max_bad_fraction."
            )

    def _write(self, rows: list[dict]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._run.say(f"{len(rows)} rows could not be used, noted in {self._path}; one is {rows[0]['row']}")
