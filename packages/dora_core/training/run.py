"""One run: its folder, its ranks, its log, its checkpoints, and the wish to stop."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dora_core.data.sampler import StepPlan
from dora_core.engine.build import Engine
from dora_core.engine.distributed import World, bound_collectives, stop_with_launcher
from dora_core.engine.peers import EXIT_STOPPED, STOP_SIGNALS, Peers
from dora_core.engine.state import restore_weights
from dora_core.training.checkpoint import CheckpointError, CheckpointStore
from dora_core.training.folder import open_run_folder
from dora_core.training.metrics import MetricLog, plot_losses
from dora_core.training.profiling import StepProfiler
from dora_core.training.progress import Progress
from dora_core.training.seeds import seed_everything
from dora_core.training.speed import Speedometer


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
        self._stepping = False
        self._saved_step: int | None = None
        self._facts: dict[str, Any] = {}
        self._log: MetricLog | None = None
        self._lock: Any = None
        self._bar: Any = None
        self._peers: Any = None
        self._profiler: Any = None
        self.speed = Speedometer()

    @classmethod
    @contextmanager
    def start(cls, config: Any) -> Iterator[Run]:
        """Join the ranks, open the run folder and seed everything; close it all at the end.

        SIGTERM, SIGUSR1 and Ctrl-C set ``stop_requested`` while the loop steps, which then saves; before and after,
        when there is nothing to save, they end the process at once. Raises ``ValueError`` as ``open_run_folder`` does,
        and ``LostRankError`` where another rank of this machine was killed. A rank whose collective then never returns
        is ended.
        """
        world = World.start(config.deepspeed.timeout_s)
        run = cls(config, world)
        before = {number: signal.signal(number, run._request_stop) for number in STOP_SIGNALS}
        stop_with_launcher()
        try:
            run._peers = Peers(world, run.checkpoints.how_to_go_on)
            with run._peers.blamed():
                run._log, run._lock = open_run_folder(config, world, run.checkpoints, run.say)
                run._profiler = StepProfiler(config.log.profile_step if world.is_main else None, run.folder, run.say)
                seed_everything(config.run.seed * 100_003 + world.rank, config.run.deterministic)
                yield run
                run._peers.part()
        finally:
            if run._peers is not None:
                run._peers.leave("stopped" if isinstance(sys.exception(), SystemExit) else "failed")
            for number, handler in before.items():
                if signal.getsignal(number) == run._request_stop:
                    signal.signal(number, handler)
            for resource in filter(None, (run._log, run._lock)):
                resource.close()

    def say(self, text: Any) -> None:
        """Print on rank 0, clear of the progress bar."""
        if self.world.is_main:
            if self._bar is not None:
                self._bar.clear()
            print(text, flush=True)

    def plan(self, num_rows: int, **grouping: Any) -> StepPlan:
        """Return this rank's plan of the rows by the recipe's batch sizes and seed; ``StepPlan`` says how to group."""
        train, world = self.config.train, self.world
        return StepPlan(
            num_rows=num_rows,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            seed=self.config.run.seed,
            world_size=world.size,
            rank=world.rank,
            **grouping,
        )

    def resume(self, engine: Engine, num_steps: int, data: str) -> Progress:
        """Return where to start: from the newest checkpoint that verifies, as ``run.resume`` says, or from step 0.

        ``data`` names the rows and their order. A run goes on only with the rows, the batch size and the optimizer
        that it began with; other ranks, ZeRO stages and numbers of steps are welcome.
        """
        bound_collectives(self.config.deepspeed.timeout_s)
        train = self.config.train
        self._facts = {
            "data": data,
            "run.seed": self.config.run.seed,
            "train.global_batch_size": train.global_batch_size,
            "train.optimizer": train.optimizer,
        }
        step, exists = None, False
        if self.config.run.resume != "never":
            newest = self.world.on_main(lambda: (self.checkpoints.newest(self.say), bool(self.checkpoints.steps())))
            step, exists = self.world.broadcast(newest)
            if step is None and (self.config.run.resume == "must" or exists):
                raise CheckpointError(
                    f"run.resume is {self.config.run.resume!r}, but {self.checkpoints.folder} holds no checkpoint that "
                    "verifies. Set run.resume: never and another run.name to start anew."
                )
        if step is None:
            progress = Progress()
        else:
            progress = self.checkpoints.restore(engine, step, self._facts)
            self.world.on_main(lambda: self.checkpoints.drop_after(step))
            self.say(f"resumed from {self.checkpoints.path(step)}")
        if progress.step > num_steps:
            raise CheckpointError(
                f"The run is at step {progress.step} already, and train.max_steps and train.num_epochs end it at step "
                f"{num_steps}. Raise them, or start a new run."
            )
        self._saved_step = step
        self.world.on_main(lambda: self._log.drop_after(progress.step))
        self.speed.restart(progress)
        return progress

    def save(self, engine: Engine, progress: Progress) -> None:
        """Write a checkpoint, then delete those no longer wanted. Every rank must call it."""
        self.checkpoints.save(engine, progress, self._facts)
        self._saved_step = progress.step
        best = progress.best_step if self.config.train.keep_best else None
        self.world.on_main(lambda: self.checkpoints.prune(self.config.train.keep_last, best, progress.step))

    def save_when_due(self, engine: Engine, progress: Progress, num_steps: int, stop: float) -> None:
        """Save where ``train.save_every`` or the lowest validation loss asks for it, and leave if a rank must ``stop``.

        Every rank must call it, after each step and with the same ``stop``.
        """
        is_best = self.config.train.keep_best and progress.step == progress.best_step
        if is_best or progress.due(self.config.train.save_every, num_steps):
            self.save(engine, progress)
        self._profiler.after_step(progress.step)
        if stop:
            self.leave_stopped(engine, progress)

    def restore_best(self, engine: Engine, progress: Progress) -> None:
        """With ``train.keep_best``, go back to the weights of the lowest validation loss. Every rank must call it."""
        if self.config.train.keep_best and progress.best_step not in (None, progress.step):
            restore_weights(engine, self.checkpoints.weights(progress.best_step))
            self.say(f"exporting step {progress.best_step}, of the lowest validation loss {progress.best_loss:.4f}")

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
    def stepping(self, progress: Progress, num_steps: int) -> Iterator[None]:
        """Within the block steps are made: show a bar on rank 0, let requests to stop wait, and draw ``loss.png``."""
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
        self._stepping = True
        try:
            with self._peers.blamed():
                yield
        finally:
            self._stepping = False
            if self._bar is not None:
                self._bar.close()
                self._bar = None
            if self._log is not None and self._log.path.is_file():
                plot_losses({self.config.run.name: self._log.path}, self.folder / "loss.png")
        self._profiler.finish()
        if self.world.sum([self.stop_requested])[0]:  # in the last step, which is saved
            self._peers.part()
            raise SystemExit(EXIT_STOPPED)

    def leave_stopped(self, engine: Engine, progress: Progress) -> None:
        """Save and end the process as stopped on request. Every rank must call it."""
        if progress.step != self._saved_step:
            self.save(engine, progress)
        self._profiler.finish()
        self.say(f"stopped on request at step {progress.step}; go on with --run.resume auto")
        self._peers.part()
        raise SystemExit(EXIT_STOPPED)

    def _request_stop(self, number: int, frame: Any) -> None:
        if not self._stepping:
            if self._peers is not None:
                self._peers.refuse_lost()  # the launcher tells a rank to stop when another was killed
            raise SystemExit(EXIT_STOPPED)
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_requested = True
