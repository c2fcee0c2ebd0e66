"""Score a VL-BART on the benchmarks of its recipe: ``dora evaluate video --config RECIPE [--adapter FOLDER]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dora_core.adapters import reuse_norms
from dora_core.engine.build import Engine, ready_to_answer
from dora_core.engine.distributed import World
from dora_core.evaluation.evaluator import EvaluationContext, Evaluator
from dora_core.evaluation.results import Metric
from dora_core.evaluation.runner import evaluators_of, reported_metrics, score_tasks
from dora_core.training.metrics import plot_accuracies
from dora_core.training.run import Run
from dora_core.training.script import run_evaluation
from pipelines.video.answering import Answering
from pipelines.video.config import RECIPES, DataSection, EvaluateSection, VideoConfig
from pipelines.video.data import the_tasks
from pipelines.video.encode import TextEncoder
from pipelines.video.features import FrozenEncoder
from pipelines.video.looking import Look, open_look
from pipelines.video.model import load_tokenizer, load_vl_bart, text_encoder

COLUMNS = ("name", "metric", "value", "stderr", "n", "majority", "num_unparsed")


@dataclass(frozen=True)
class Shuffled:
    """An evaluator whose rows see what the rows half the list away should: what it scores needs no looking."""

    evaluator: Evaluator

    @property
    def name(self) -> str:
        """The evaluator's name."""
        return self.evaluator.name

    def load(self, section: EvaluateSection) -> list[dict[str, Any]]:
        """Return the rows, each with the pictures or videos of another."""
        rows = self.evaluator.load(section)
        half = len(rows) // 2
        others = rows[half:] + rows[:half]
        return [{**row, "visuals": other["visuals"]} for row, other in zip(rows, others, strict=True)]

    def predict(self, rows: list[dict[str, Any]], context: EvaluationContext) -> list[dict[str, Any]]:
        """Return the evaluator's predictions."""
        return self.evaluator.predict(rows, context)

    def score(self, predictions: list[dict[str, Any]]) -> list[Metric]:
        """Return the evaluator's metrics."""
        return self.evaluator.score(predictions)


def evaluate_model(
    model: Any,
    answering: Answering,
    section: EvaluateSection,
    data: DataSection,
    folder: Path,
    *,
    synced: bool = False,
    device: torch.device | None = None,
) -> list[Metric]:
    """Return the metrics of the benchmarks of ``section``, then ``video/average``, the mean of those the paper reports.

    ``score_tasks`` says more; the submissions come into ``folder`` too. Set ``synced`` under ZeRO-3, with the
    ``device`` to compute on.
    """
    return score_tasks(
        "video",
        model,
        answering.text.tokenizer,
        replace(section, path=section.path or data.path),
        folder,
        scoring_settings(section, data),
        extra={"answering": answering},
        wrap=Shuffled if section.look == "shuffled" else None,
        columns=COLUMNS,
        synced=synced,
        device=device,
    )


def scoring_settings(section: EvaluateSection, data: DataSection) -> dict[str, Any]:
    """Return the settings that can change a score; where the data lies, and batch sizes, cannot."""
    names = ("split", "num_beams", "reference_decoding", "max_new_tokens", "look")
    settings = {name: value for name, value in asdict(section).items() if name in names}
    visual = {name: value for name, value in asdict(data.visual).items() if name not in ("path", "folders")}
    lengths = {task.name: task.max_text_length for task in the_tasks(data)}
    return settings | {
        "visual": visual,
        "lengths": lengths,
        "task_prompts": data.task_prompts,
        "reference_truncation": data.reference_truncation,
    }


def evaluate_in_run(
    run: Run, engine: Engine, text: TextEncoder, look: Look, encoder: FrozenEncoder | None, when: str
) -> None:
    """Score the model of a run on its recipe's benchmarks into ``results/<when>``. Every rank must call it.

    ``look`` must be one of ``with_scored_collections``.
    """
    folder = run.folder / "results" / when
    cfg = run.config
    tasks = {task.name: task for task in the_tasks(cfg.data)}
    with reuse_norms(engine.module), engine.evaluating():
        metrics = evaluate_model(
            engine.module,
            Answering(text, look, encoder, tasks),
            cfg.evaluate,
            cfg.data,
            folder,
            synced=engine.stage == 3,
            device=run.world.device,
        )
    shown = {metric.name.removeprefix("video/"): metric for metric in reported_metrics(metrics, "video")}
    if run.world.is_main and shown:
        scores = {cfg.run.name: {name: metric.value for name, metric in shown.items()}}
        levels = {name: metric.extra["majority"] for name, metric in shown.items()}
        plot_accuracies(scores, levels, folder / "accuracy.png", "best constant answer")


def scored_collections(section: EvaluateSection, data: DataSection) -> list[str]:
    """Return the collections that the rows to score show. Raises ``ValueError`` for missing annotations."""
    found: set[str] = set()
    for task in (evaluator.task for evaluator in evaluators_of("video", section.tasks)):
        records, annotations = task.read(section.path or data.path, section.split)
        for record in records[:1]:  # none at all is for the evaluator to complain of
            found |= {visual.partition("/")[0] for visual in task.checked_example(record, annotations).visuals}
    return sorted(found)


def with_scored_collections(look: Look, section: EvaluateSection, data: DataSection) -> Look:
    """Return ``look`` with the collections that only scoring needs, such as GQA's own pictures, beside its own.

    Raises ``ValueError`` for annotations, features and media that are missing.
    """
    missing = [name for name in scored_collections(section, data) if name not in look.folders]
    return look.also(missing, data.visual.path or data.path)


def evaluate(cfg: VideoConfig, world: World, adapter: Path | None, output: Path) -> None:
    """Score the recipe's model, with an adapter if one is given."""
    shown = world.agree(lambda: scored_collections(cfg.evaluate, cfg.data))
    look, encoder = world.agree(lambda: open_look(cfg.data.visual, cfg.data.path, shown, world.device))
    tokenizer = load_tokenizer(cfg.model)
    model = load_vl_bart(cfg.model, tokenizer, look.dim, cfg.train.precision)
    model = ready_to_answer(model, adapter, cfg.train.precision, world.device)
    text = text_encoder(cfg, tokenizer)
    answering = Answering(text, look, encoder, {task.name: task for task in the_tasks(cfg.data)})
    with reuse_norms(model) if adapter else torch.no_grad():
        evaluate_model(model, answering, cfg.evaluate, cfg.data, output)


def main(arguments: Sequence[str]) -> None:
    """Read the command line and score."""
    run_evaluation("video", VideoConfig, RECIPES, evaluate, arguments)
