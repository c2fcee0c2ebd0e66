"""One run: its folder, its ranks, its log, its checkpoints, and the wish to stop."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dora_core.config import ConfigError, dump_config, read_yaml
from dora_core.engine.build import Engine
from dora_core.engine.distributed import World, bound_collectives, stop_with_launcher
from dora_core.training.checkpoint import CheckpointError, CheckpointStore
from dora_core.training.environment import describe_environment
from dora_core.training.metrics import MetricLog, plot_losses
from dora_core.training.progress import Progress
from dora_core.training.speed import Speedometer

EXIT_STOPPED = 75
"""Exit status of a run that was told to stop, saved and can be resumed (EX_TEMPFAIL)."""


class TrainingDivergedError(ValueError):
    """Gradients were not finite for too many steps in a row."""


class Run:
    """What the loop of every pipeline needs around it; made by ``Run.start``."""

    def __init__(self, config: Any, world: World) -> None:
        self.config = config
        self.world = world
        self.folder = Path(config.run.root) / config.run.name
        self.checkpoints = CheckpointStore(self.folder / "checkpoints")
        self.stop_requested = False
        self._log: MetricLog | None = None
        self._lock: Any = None
        self._bar: Any = None
        self.speed = Speedometer()

    @classmethod
    @contextmanager
    def start(cls, config: Any) -> Iterator[Run]:
        """Join the ranks, open the run folder and seed everything; close it all at the end.

        SIGTERM, SIGUSR1 and Ctrl-C set ``stop_requested``. Raises ``ConfigError`` if the folder is in use, or holds
        checkpoints that ``run.resume`` does not allow.
        """
        world = World.start(config.deepspeed.timeout_s)
        run = cls(config, world)
        before = {number: signal.signal(number, run._request_stop) for number in _stop_signals()}
        stop_with_launcher()
        try:
            run._open()
            seed = config.run.seed * 100_003 + world.rank
            torch.manual_seed(seed)
            random.seed(seed)
            if config.run.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
            yield run
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            run._close()

    def say(self, text: Any) -> None:
        """Print on rank 0, clear of the progress bar."""
        if self.world.is_main:
            if self._bar is not None:
                self._bar.clear()
            print(text, flush=True)

    def resume(self, engine: Engine) -> Progress:
        """Return where to start: from the newest checkpoint that verifies, as ``run.resume`` says, or from step 0."""
        bound_collectives(self.config.deepspeed.timeout_s)
        step = None
        if self.config.run.resume != "never":
            step = self.world.broadcast(self.checkpoints.newest(self.say) if self.world.is_main else None)
            if step is None and (self.config.run.resume == "must" or self.checkpoints.steps()):
                raise CheckpointError(
                    f"run.resume is {self.config.run.resume!r}, but {self.checkpoints.folder} holds no checkpoint that "
                    "verifies. Set run.resume: never and another run.name to start anew."
                )
        progress = Progress() if step is None else self.checkpoints.restore(engine, step)
        if step is not None:
            self.say(f"resumed from {self.checkpoints.path(step)}")
        if self._log is not None:
            self._log.drop_after(progress.step)
        self.speed.restart(progress)
        return progress

    def save(self, engine: Engine, progress: Progress) -> None:
        """Write a checkpoint, then delete those no longer wanted. Every rank must call it."""
        self.checkpoints.save(engine, progress)
        if self.world.is_main:
            self.checkpoints.prune(
                self.config.train.keep_last, progress.best_step if self.config.train.keep_best else None
            )

    def log_step(
        self, engine: Engine, progress: Progress, num_steps: int, loss_sum: torch.Tensor, **values: Any
    ) -> None:
        """Count a finished optimizer step; every ``train.log_every`` steps write its numbers. Every rank must call it.

        ``loss_sum`` is this rank's, over the step's targets, whose number over all ranks is ``values["num_targets"]``.
        """
        if (engine.num_skipped_in_row >= 10 and engine.train.precision != "fp16") or engine.num_skipped_in_row >= 40:
            raise TrainingDivergedError(
                f"The gradient was not finite for {engine.num_skipped_in_row} steps in a row, up to {progress.step}. "
                "Lower train.lr, set train.clip_grad_norm, or use train.precision: bf16 or fp32."
            )
        if self._bar is not None:
            self._bar.update(1)
        if not progress.due(self.config.train.log_every, num_steps) and progress.step > 1:
            return
        (total,) = self.world.sum([float(loss_sum)])
        if self._log is None:
            return
        row = {"loss": total / max(1.0, values.pop("num_targets")), **values, "num_tokens": progress.num_tokens}
        row |= self.speed.read(progress)
        self._log.write(progress.step, row)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_s']:,.0f} tokens/s")
        self.speed.restart(progress)

    def log(self, progress: Progress, **values: Any) -> None:
        """Write other numbers for this step."""
        if self._log is not None:
            self._log.write(progress.step, values)
            self.say(f"step {progress.step}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items()))
        self.speed.restart(progress)

    @contextmanager
    def progress_bar(self, progress: Progress, num_steps: int) -> Iterator[None]:
        """Show a bar with loss, tokens/s and remaining time on rank 0."""
        if self.world.is_main and self.config.log.progress:
            from tqdm import tqdm

            self._bar = tqdm(
                total=num_steps,
                initial=progress.step,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5,
                file=sys.stderr,
            )
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
            self.draw_losses()

    def draw_losses(self) -> None:
        """Write ``loss.png``."""
        if self._log is not None and self._log.path.is_file():
            plot_losses({self.config.run.name: self._log.path}, self.folder / "loss.png")

    def leave_stopped(self, engine: Engine, progress: Progress) -> None:
        """Save and end the process as stopped on request. Every rank must call it."""
        if progress.step not in self.checkpoints.steps():
            self.save(engine, progress)
        self.say(f"stopped on request at step {progress.step}; go on with --run.resume auto")
        raise SystemExit(EXIT_STOPPED)

    def _open(self) -> None:
        problem = None
        if self.world.is_main:
            try:
                self._open_folder()
            except (ConfigError, OSError) as error:
                problem = str(error)
        problem = self.world.broadcast(problem)
        if problem:
            raise ConfigError(problem)

    def _open_folder(self) -> None:
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "run.lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{self.folder} is in use by another process. Wait for it, or set another run.name."
            ) from None
        if self.config.run.resume == "never" and self.checkpoints.steps():
            raise ConfigError(
                f"{self.folder} already holds checkpoints (last step {self.checkpoints.steps()[-1]}). Set run.resume: "
                "auto to go on, or another run.name to start anew."
            )
        if self.config.run.resume == "never":
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        self.checkpoints.clean()
        path = self.folder / "config.yaml"
        before = read_yaml(path) if path.is_file() and self.config.run.resume != "never" else None
        path.write_text(dump_config(self.config), encoding="utf-8")
        if before is not None:
            self._say_changes(before, read_yaml(path))
        (self.folder / "environment.json").write_text(
            json.dumps(describe_environment(self.world.size), indent=2) + "\n", encoding="utf-8"
        )
        self._log = MetricLog(self.folder, self.config.log, self.config.run.name)

    def _say_changes(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for section, values in now.items():
            for key, value in values.items():
                old = before.get(section, {}).get(key)
                if old != value and (section, key) != ("run", "resume"):
                    self.say(f"note: {section}.{key} was {old!r} and is now {value!r}")

    def _close(self) -> None:
        if self._log is not None:
            self._log.close()
        if self._lock is not None:
            self._lock.close()

    def _request_stop(self, number: int, frame: Any) -> None:
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_requested = True


def _stop_signals() -> tuple[signal.Signals, ...]:
    return (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
