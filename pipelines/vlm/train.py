"""Fine-tune a LLaVA: ``deepspeed pipelines/vlm/train.py --config RECIPE [--section.field value]``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from this checkout, never from this file's own folder
    _root = Path(__file__).resolve().parents[2]
    sys.path[:] = [
        str(_root / "packages"),
        str(_root),
        *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent),
    ]

import torch

from dora_core.adapters import apply_adapters, checkpoint_activations, reuse_norms
from dora_core.data.loader import StepLoader
from dora_core.data.rows import DataError
from dora_core.engine.build import DTYPES, Engine, build_engine
from dora_core.engine.liger import use_liger
from dora_core.engine.zero import resolve_zero
from dora_core.training.bad_rows import BadRows
from dora_core.training.run import Run
from dora_core.training.script import run_training
from dora_core.training.validation import sum_over_rows
from pipelines.vlm.batches import Batch, Collate, to_model
from pipelines.vlm.config import RECIPES, VLMConfig
from pipelines.vlm.data import ConversationRows, load_training_data
from pipelines.vlm.encode import Encoder
from pipelines.vlm.evaluate import evaluate_in_run
from pipelines.vlm.export import export, what_is_trained
from pipelines.vlm.model import instruction_loss, load_llava, load_tokenizer, param_groups

COUNTS = ("num_images", "num_rows", "num_bad", "num_truncated", "num_untrainable")


def train(cfg: VLMConfig) -> None:
    """Load, adapt, shard, step, save; everything a run leaves behind is in its folder."""
    with Run.start(cfg) as run:
        zero = resolve_zero(cfg.deepspeed, cfg.train, run.world)
        tokenizer = load_tokenizer(cfg.model)
        model, vision = load_llava(cfg.model, tokenizer, cfg.train.precision, zero, seed=cfg.run.seed)
        encoder = Encoder(tokenizer, vision, cfg.data)
        rows, validation, mixture, data_report = run.world.agree(
            lambda: load_training_data(cfg.data, encoder, cfg.run.seed)
        )
        run.world.require_same("training data", data_report.dataset_hash)
        run.say(data_report)
        run.say(apply_adapters(model, cfg.adapter))
        if cfg.train.gradient_checkpointing:
            checkpoint_activations(model, cfg.adapter)
        run.say(f"the result will be: {what_is_trained(model)}")
        run.say(run.world.agree(lambda: use_liger(model, cfg.train, run.world.device)))
        engine = build_engine(model, param_groups(model, cfg.train), cfg.train, zero, run.world)

        plan = run.plan(
            len(rows),
            mixture=mixture,
            lengths=rows.lengths() if cfg.data.group_by_modality else None,
            groups=rows.modalities() if cfg.data.group_by_modality else None,
        )
        num_steps = plan.num_steps(cfg.train.num_epochs, cfg.train.max_steps)
        progress = run.resume(engine, num_steps, f"{data_report.dataset_hash}, {len(rows)} rows")
        collate = Collate(tokenizer.pad_token_id, vision.size)
        workers = cfg.data.num_workers
        loader = StepLoader(plan, rows, collate, start_step=progress.step, end_step=num_steps, num_workers=workers)
        bad_rows = BadRows(run, progress, cfg.data.max_bad_fraction, data_report.epoch_size)
        if cfg.evaluate.before_training and progress.step == 0:
            evaluate_in_run(run, engine, encoder, "before")

        with reuse_norms(engine.module), run.stepping(progress, num_steps):
            for batches in run.speed.waiting_for(loader):
                learning_rates = engine.begin_step(progress.step, num_steps)
                names = ("num_targets", "num_tokens", *COUNTS)
                own = [sum(batch["counts"][name] for batch in batches) for name in names]
                stop, targets, tokens, *totals = run.world.sum([run.stop_requested, *own])
                counts = dict(zip(COUNTS, totals, strict=True))
                loss_sum = torch.zeros((), device=run.world.device)
                for batch in batches:
                    inputs = to_model(batch, encoder.transform, DTYPES[cfg.train.precision], run.world.device)
                    loss = instruction_loss(engine, inputs)
                    engine.backward(loss, max(1.0, targets))
                    loss_sum += loss.detach()
                grad_norm, _ = engine.end_step()
                progress.advance(tokens, targets, **counts)
                run.log_step(
                    engine,
                    progress,
                    num_steps,
                    loss_sum,
                    num_targets=targets,
                    lr=learning_rates[0],
                    grad_norm=grad_norm,
                    **progress.counts,
                )
                bad = [(row.where, row.reason) for batch in batches for row in batch["bad_rows"]]
                try:
                    bad_rows.note(progress, counts["num_bad"], bad)
                except DataError:  # on every rank: what was learned so far is kept
                    run.save(engine, progress)
                    raise
                if validation is not None and progress.due(cfg.train.eval_every, num_steps):
                    loss, num_bad = validation_loss(engine, validation, collate, encoder, cfg)
                    progress.note_validation(loss)
                    run.log(progress, validation_loss=loss, **({"num_bad_validation": num_bad} if num_bad else {}))
                run.save_when_due(engine, progress, num_steps, stop)

        run.restore_best(engine, progress)
        written = export(
            engine.module,
            run.folder,
            tokenizer=tokenizer,
            vision=vision,
            adapter=cfg.adapter,
            base=cfg.model.path,
            precision=cfg.train.precision,
            template=cfg.data.template,
            world=run.world,
        )
        run.say(f"wrote {written}")
        if cfg.evaluate.after_training:
            evaluate_in_run(run, engine, encoder, "after")


def validation_loss(
    engine: Engine, rows: ConversationRows, collate: Collate, encoder: Encoder, cfg: VLMConfig
) -> tuple[float, float]:
    """Return the mean loss per target token over the validation rows, and how many of the rows could not be read.

    Every rank must call it. The loss is NaN, which is never the best, if no row has a target.
    """

    def measure(batch: Batch) -> tuple[torch.Tensor, int, int]:
        inputs = to_model(batch, encoder.transform, DTYPES[cfg.train.precision], engine.world.device)
        return instruction_loss(engine, inputs), batch["counts"]["num_targets"], batch["counts"]["num_bad"]

    size, workers = cfg.train.micro_batch_size, cfg.data.num_workers
    loss_sum, targets, num_bad = sum_over_rows(engine, rows, collate, measure, size, workers)
    return (loss_sum / targets if targets else math.nan), num_bad


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the recipe and the command line, then train."""
    run_training(train, VLMConfig, RECIPES, arguments)


if __name__ == "__main__":
    main()
