"""Fine-tune a causal language model: ``deepspeed pipelines/llm/train.py --config RECIPE [--section.field value]``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from this checkout, never from this file's own folder
    _root = Path(__file__).resolve().parents[2]
    sys.path[:] = [
        str(_root / "packages"),
        str(_root),
        *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent),
    ]

import torch

from dora_core.adapters import AdapterReport, apply_adapters, checkpoint_activations, reuse_norms, save_adapter
from dora_core.data.collate import Batch, num_targets, num_tokens
from dora_core.data.loader import StepLoader
from dora_core.engine.build import Engine, build_engine, recipe_groups
from dora_core.engine.export import save_model
from dora_core.engine.liger import use_liger
from dora_core.engine.zero import resolve_zero
from dora_core.training.metrics import plot_accuracies
from dora_core.training.progress import Progress
from dora_core.training.run import Run
from dora_core.training.script import run_training
from dora_core.training.validation import sum_over_rows
from pipelines.llm.batches import make_collate, make_items, move
from pipelines.llm.config import RECIPES, LLMConfig
from pipelines.llm.data import load_training_data
from pipelines.llm.evaluate import evaluate_model
from pipelines.llm.model import load_model, load_tokenizer, next_token_loss


def train(cfg: LLMConfig) -> None:
    """Load, adapt, shard, step, save; everything a run leaves behind is in its folder."""
    with Run.start(cfg) as run:
        zero = resolve_zero(cfg.deepspeed, cfg.train, run.world)
        tokenizer = load_tokenizer(cfg.model)
        rows, validation, data_report = run.world.agree(lambda: load_training_data(cfg.data, tokenizer, cfg.run.seed))
        run.world.require_same("training data", data_report.dataset_hash)
        run.say(data_report)
        items = make_items(rows, cfg.data, cfg.run.seed)
        validation = make_items(validation, cfg.data, cfg.run.seed)
        with zero.sharded_loading():
            model = load_model(cfg.model, cfg.train.precision)
        report = apply_adapters(model, cfg.adapter)
        run.say(report)
        if cfg.train.gradient_checkpointing:
            checkpoint_activations(model, cfg.adapter)
        run.say(run.world.agree(lambda: use_liger(model, cfg.train, run.world.device)))
        engine = build_engine(model, recipe_groups(model, cfg.train), cfg.train, zero, run.world)

        by_length = cfg.data.group_by_length and not cfg.data.packing
        plan = run.plan(len(items), lengths=[len(row.input_ids) for row in rows] if by_length else None)
        num_steps = plan.num_steps(cfg.train.num_epochs, cfg.train.max_steps)
        progress = run.resume(engine, num_steps, f"{data_report.dataset_hash}, {len(items)} items")
        collate = make_collate(cfg.data, tokenizer.pad_token_id, cfg.model.attention)
        loader = StepLoader(
            plan, items, collate, start_step=progress.step, end_step=num_steps, num_workers=cfg.data.num_workers
        )
        if cfg.evaluate.before_training and progress.step == 0:
            score(run, engine, tokenizer, cfg, "before")

        with reuse_norms(engine.module), run.stepping(progress, num_steps):
            for batches in run.speed.waiting_for(loader):
                learning_rates = engine.begin_step(progress.step, num_steps)
                counts = [
                    sum(map(num_targets, batches)),
                    sum(num_tokens(batch, tokenizer.pad_token_id) for batch in batches),
                    run.stop_requested,
                ]
                targets, tokens, stop = run.world.sum(counts)
                loss_sum = torch.zeros((), device=run.world.device)
                for batch in batches:
                    loss = next_token_loss(engine, move(batch, run.world.device))
                    engine.backward(loss, max(1.0, targets))
                    loss_sum += loss.detach()
                grad_norm, _ = engine.end_step()
                progress.advance(tokens, targets)
                run.log_step(
                    engine,
                    progress,
                    num_steps,
                    loss_sum,
                    num_targets=targets,
                    lr=learning_rates[0],
                    grad_norm=grad_norm,
                )
                if validation and progress.due(cfg.train.eval_every, num_steps):
                    loss = validation_loss(engine, validation, collate, cfg.train.micro_batch_size)
                    progress.note_validation(loss)
                    run.log(progress, validation_loss=loss)
                run.save_when_due(engine, progress, num_steps, stop)

        export(run, engine, tokenizer, cfg, progress, report)
        if cfg.evaluate.after_training:
            score(run, engine, tokenizer, cfg, "after")


def validation_loss(engine: Engine, items: list, collate: Callable[[list], Batch], batch_size: int) -> float:
    """Return the mean loss per target token over the validation rows or packs. Every rank must call it."""

    def measure(batch: Batch) -> tuple[torch.Tensor, int]:
        return next_token_loss(engine, move(batch, engine.world.device)), num_targets(batch)

    loss_sum, targets = sum_over_rows(engine, items, collate, measure, batch_size)
    return loss_sum / max(1.0, targets)


def export(run: Run, engine: Engine, tokenizer, cfg: LLMConfig, progress: Progress, report: AdapterReport) -> None:
    """Write the result: the adapter in PEFT's layout, or the whole model after full fine-tuning."""
    run.restore_best(engine, progress)
    if report.num_low_rank + report.num_magnitude:
        folder = save_adapter(engine.module, cfg.adapter, run.folder / "adapter", cfg.model.path)
    else:
        folder = save_model(engine.module, run.folder / "model", cfg.train.precision)
    run.world.on_main(lambda: tokenizer.save_pretrained(folder))
    run.say(f"wrote {folder}")


def score(run: Run, engine: Engine, tokenizer, cfg: LLMConfig, when: str) -> None:
    """Score the model on the recipe's benchmarks into ``results/<when>``. Every rank must call it."""
    folder = run.folder / "results" / when
    with reuse_norms(engine.module), engine.evaluating():
        metrics = evaluate_model(
            engine.module, tokenizer, cfg.evaluate, cfg.data.template, folder, synced=engine.stage == 3
        )
    if run.world.is_main:
        names = {metric.name: metric.name.removeprefix("llm/") for metric in metrics}
        accuracies = {names[metric.name]: metric.value for metric in metrics}
        chance = {names[metric.name]: metric.extra["chance"] for metric in metrics}
        plot_accuracies({cfg.run.name: accuracies}, chance, folder / "accuracy.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the recipe and the command line, then train."""
    run_training(train, LLMConfig, RECIPES, arguments)


if __name__ == "__main__":
    main()
