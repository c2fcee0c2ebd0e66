"""Fine-tune a VL-BART on many tasks: ``deepspeed pipelines/video/train.py --config RECIPE [--section.field value]``."""

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
from torch.utils.data import Subset

from dora_core.adapters import apply_adapters, checkpoint_activations, reuse_norms
from dora_core.data.loader import StepLoader
from dora_core.data.rows import DataError
from dora_core.engine.build import Engine, build_engine, recipe_groups
from dora_core.engine.liger import use_liger
from dora_core.engine.zero import resolve_zero
from dora_core.training.bad_rows import BadRows
from dora_core.training.run import Run
from dora_core.training.script import run_training
from dora_core.training.validation import sum_over_rows
from pipelines.video.batches import Batch, Collate, to_model
from pipelines.video.config import RECIPES, VideoConfig
from pipelines.video.data import TaskData, TaskRows, collections_of, load_data, probe, report_on
from pipelines.video.evaluate import evaluate_in_run, with_scored_collections
from pipelines.video.export import export
from pipelines.video.features import FrozenEncoder
from pipelines.video.looking import open_look
from pipelines.video.model import decoder_start, load_tokenizer, load_vl_bart, text_encoder, weighted_loss
from pipelines.video.plan import TaskPlan

COUNTS = ("num_frames", "num_rows", "num_bad", "num_truncated")


def train(cfg: VideoConfig) -> None:
    """Load, adapt, shard, step, save; everything a run leaves behind is in its folder."""
    with Run.start(cfg) as run:
        world, device = run.world, run.world.device
        zero = resolve_zero(cfg.deepspeed, cfg.train, world)
        tokenizer = load_tokenizer(cfg.model)
        text = text_encoder(cfg, tokenizer)
        train_data, held = world.agree(lambda: load_data(cfg.data, cfg.run.seed))
        shown = collections_of([*train_data, *held])
        look, encoder = world.agree(lambda: open_look(cfg.data.visual, cfg.data.path, shown, device))
        rows, held_rows = (TaskRows(data, text, look, cfg.run.seed) for data in (train_data, held))
        world.agree(lambda: [probe(rows, train_data), probe(held_rows, held)])
        report = world.agree(lambda: report_on(cfg.data, train_data, held, look))
        scored = look
        if cfg.evaluate.before_training or cfg.evaluate.after_training:  # what is missing should not wait for the end
            scored = world.agree(lambda: with_scored_collections(look, cfg.evaluate, cfg.data))
        world.require_same("training data", report.dataset_hash)
        run.say(report)

        model = load_vl_bart(cfg.model, tokenizer, look.dim, cfg.train.precision, zero)
        run.say(apply_adapters(model, cfg.adapter))
        if cfg.train.gradient_checkpointing:
            checkpoint_activations(model, cfg.adapter)
        run.say(world.agree(lambda: use_liger(model, cfg.train, device)))
        engine = build_engine(model, recipe_groups(model, cfg.train), cfg.train, zero, world)

        tasks = [each.task for each in train_data]
        plan = TaskPlan(
            [len(each.places) for each in train_data],
            [max(1, round(task.batch_ratio * cfg.train.global_batch_size)) for task in tasks],
            accumulation=engine.accumulation,
            seed=cfg.run.seed,
            world_size=world.size,
            rank=world.rank,
        )
        num_steps = plan.num_steps(cfg.train.num_epochs, cfg.train.max_steps)
        progress = run.resume(engine, num_steps, f"{report.dataset_hash}, {len(rows)} rows")
        collate = Collate(tasks, look, tokenizer.pad_token_id, decoder_start(model.config))
        loader = StepLoader(
            plan, rows, collate, start_step=progress.step, end_step=num_steps, num_workers=cfg.data.num_workers
        )
        bad_rows = BadRows(run, progress, cfg.data.max_bad_fraction, report.epoch_size)
        if cfg.evaluate.before_training and progress.step == 0:
            evaluate_in_run(run, engine, text, scored, encoder, "before")

        with reuse_norms(engine.module), run.stepping(progress, num_steps):
            for batches in run.speed.waiting_for(loader):
                task = tasks[plan.task(progress.step)]
                rates = engine.begin_step(progress.step, num_steps)
                sums = [sum(b["counts"][name] for b in batches) for name in ("loss_units", "num_targets", "num_tokens")]
                own = [sum(batch["counts"][name] for batch in batches) for name in COUNTS]
                stop, units, targets, tokens, *totals = world.sum([run.stop_requested, *sums, *own])
                loss_sum = torch.zeros((), device=device)
                for batch in batches:
                    loss = weighted_loss(engine, to_model(batch, look, encoder, device))
                    engine.backward(loss, max(1.0, units))
                    loss_sum += loss.detach()
                grad_norm, _ = engine.end_step()
                counts = dict(zip(COUNTS, totals, strict=True))
                progress.advance(tokens, targets, **counts)
                logged = {"task": task.name, "lr": rates[0], "grad_norm": grad_norm, **progress.counts}
                run.log_step(engine, progress, num_steps, loss_sum, num_targets=units, **logged)
                bad = [(row.where, row.reason) for batch in batches for row in batch["bad_rows"]]
                try:
                    bad_rows.note(progress, counts["num_bad"], bad)
                except DataError:  # on every rank: what was learned so far is kept
                    run.save(engine, progress)
                    raise
                if held and progress.due(cfg.train.eval_every, num_steps):
                    losses = validation_losses(engine, held, held_rows, collate, encoder, cfg)
                    progress.note_validation(losses["validation_loss"])
                    run.log(progress, **losses)
                run.save_when_due(engine, progress, num_steps, stop)

        run.restore_best(engine, progress)
        run.say(f"wrote {export(engine.module, run.folder, tokenizer, cfg, world)}")
        if cfg.evaluate.after_training:
            evaluate_in_run(run, engine, text, scored, encoder, "after")


def validation_losses(
    engine: Engine,
    held: Sequence[TaskData],
    rows: TaskRows,
    collate: Collate,
    encoder: FrozenEncoder | None,
    cfg: VideoConfig,
) -> dict[str, float]:
    """Return ``validation_loss``, the mean over tasks, and that of each, weighed as in training.

    Every rank must call it. A row that cannot be read is left out and counted in ``num_bad_validation``; a task without
    any has NaN, which is never the best.
    """

    def measure(batch: Batch) -> tuple[torch.Tensor, float, int]:
        inputs = to_model(batch, collate.look, encoder, engine.world.device)
        return weighted_loss(engine, inputs), batch["counts"]["loss_units"], batch["counts"]["num_bad"]

    size, workers = cfg.train.micro_batch_size, cfg.data.num_workers
    found: dict[str, float] = {}
    num_bad, start = 0.0, 0
    for each in held:
        own = Subset(rows, range(start, start + len(each.places)))
        loss, units, bad = sum_over_rows(engine, own, collate, measure, size, workers)
        found[f"validation_loss_{each.task.name}"] = loss / units if units else math.nan
        num_bad += bad
        start += len(each.places)
    mean = sum(found.values()) / len(found)
    return {"validation_loss": mean, **found} | ({"num_bad_validation": num_bad} if num_bad else {})


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the recipe and the command line, then train."""
    run_training(train, VideoConfig, RECIPES, arguments)


if __name__ == "__main__":
    main()
