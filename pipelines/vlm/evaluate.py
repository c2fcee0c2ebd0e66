"""Score a LLaVA on the benchmarks of its recipe: ``dora evaluate vlm --config RECIPE [--adapter FOLDER]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dora_core.adapters import reuse_norms
from dora_core.config import load_config, split_arguments
from dora_core.engine.build import DTYPES, Engine, narrow_forward
from dora_core.engine.distributed import World
from dora_core.evaluation.evaluator import EvaluationContext, Evaluator
from dora_core.evaluation.results import Metric, config_hash, format_table
from dora_core.evaluation.runner import average_of_reported, place_among_ranks, reported_metrics, run_evaluators
from dora_core.registry import EVALUATORS
from dora_core.training.metrics import plot_accuracies
from dora_core.training.run import Run
from dora_core.training.script import run_script
from pipelines.vlm.answering import Answering
from pipelines.vlm.config import RECIPES, DataSection, EvaluateSection, VLMConfig
from pipelines.vlm.encode import Encoder
from pipelines.vlm.merge import load_any_adapter
from pipelines.vlm.model import load_llava, load_tokenizer

COLUMNS = ("name", "metric", "value", "stderr", "n", "majority", "num_unparsed")


@dataclass(frozen=True)
class ShuffledImages:
    """An evaluator whose questions have each other's pictures: what it scores needs no looking."""

    evaluator: Evaluator

    @property
    def name(self) -> str:
        """The evaluator's name."""
        return self.evaluator.name

    def load(self, section: EvaluateSection) -> list[dict[str, Any]]:
        """Return the rows, each with the picture of the one half the list away."""
        rows = self.evaluator.load(section)
        shown = [place for place, row in enumerate(rows) if row.get("image") or row.get("image_base64")]
        pictures = [
            {key: rows[place][key] for key in ("image", "image_base64") if key in rows[place]} for place in shown
        ]
        half = len(shown) // 2
        for place, picture in zip(shown, pictures[half:] + pictures[:half], strict=True):
            rows[place] = {**rows[place], **picture}
        return rows

    def predict(self, rows: list[dict[str, Any]], context: EvaluationContext) -> list[dict[str, Any]]:
        """Return the evaluator's predictions."""
        return self.evaluator.predict(rows, context)

    def score(self, predictions: list[dict[str, Any]]) -> list[Metric]:
        """Return the evaluator's metrics."""
        return self.evaluator.score(predictions)


def evaluate_model(
    model: Any,
    encoder: Encoder,
    section: EvaluateSection,
    dtype: torch.dtype,
    folder: Path,
    *,
    model_id: str = "",
    synced: bool = False,
    device: torch.device | None = None,
) -> list[Metric]:
    """Return the metrics of the benchmarks of ``section``, then ``vlm/average``, the mean of those the paper reports.

    Every rank must call it; every rank gets the same metrics. Rank 0 writes ``results.json``, ``predictions.jsonl``,
    LLaVA's answer files and the submissions into ``folder`` and prints the table. ``model`` is the model itself, not
    an engine around it, and comes back in its own mode. Set ``synced`` under ZeRO-3, with the ``device`` to compute on.

    Raises ``ValueError`` for no tasks, an unknown task (with close matches) or missing data, before the first
    forward pass.
    """
    if not section.tasks:
        raise ValueError("evaluate.tasks is []; it must name at least one benchmark. Add one, such as gqa.")
    evaluators = [EVALUATORS.get(f"vlm/{task}") for task in section.tasks]
    if section.shuffle_images:
        evaluators = [ShuffledImages(evaluator) for evaluator in evaluators]
    rank, size = place_among_ranks()
    context = EvaluationContext(
        model=model,
        tokenizer=encoder.tokenizer,
        section=section,
        extra={"answering": Answering(encoder, dtype), "model_id": model_id},
        config_hash=config_hash(scoring_settings(section, encoder.section)),
        rank=rank,
        world_size=size,
        synced=synced,
        device=device,
    )
    metrics = run_evaluators(evaluators, context, folder, summarize=partial(average_of_reported, pipeline="vlm"))
    if rank == 0:
        print(format_table(metrics, COLUMNS), flush=True)
    return metrics


def scoring_settings(section: EvaluateSection, data: DataSection) -> dict[str, Any]:
    """Return the settings that can change a score; where the data lies, and batch sizes, cannot."""
    names = ("max_new_tokens", "circular", "shuffle_images")
    settings = {name: value for name, value in asdict(section).items() if name in names}
    return settings | {"template": data.template, "image_aspect_ratio": data.image_aspect_ratio}


def evaluate_in_run(run: Run, engine: Engine, encoder: Encoder, when: str) -> None:
    """Score the model of a run on its recipe's benchmarks into ``results/<when>``. Every rank must call it."""
    folder = run.folder / "results" / when
    section, dtype = run.config.evaluate, DTYPES[run.config.train.precision]
    with reuse_norms(engine.module), engine.evaluating():
        metrics = evaluate_model(
            engine.module,
            encoder,
            section,
            dtype,
            folder,
            model_id=run.config.run.name,
            synced=engine.stage == 3,
            device=run.world.device,
        )
    shown = {metric.name.removeprefix("vlm/"): metric for metric in reported_metrics(metrics, "vlm")}
    if run.world.is_main and shown:
        scores = {run.config.run.name: {name: metric.value for name, metric in shown.items()}}
        levels = {name: metric.extra["majority"] for name, metric in shown.items()}
        plot_accuracies(scores, levels, folder / "accuracy.png", "best constant answer")


def main(arguments: Sequence[str]) -> None:
    """Score the recipe's model, with the adapter of ``--adapter`` unmerged if given, into ``--output``.

    Started by a launcher on several ranks, each holds the model and scores its share of the questions.
    """
    parser = argparse.ArgumentParser(prog="dora evaluate vlm", allow_abbrev=False)
    parser.add_argument("--adapter", type=Path, help="folder of an adapter: PEFT's layout, or a LLaVA run's")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results and submissions")
    own, rest = parser.parse_known_args(arguments)
    recipe, overrides = split_arguments(rest)

    def run() -> None:
        cfg = load_config(VLMConfig, recipe, overrides, recipes=RECIPES)
        world = World.start(cfg.deepspeed.timeout_s)
        tokenizer = load_tokenizer(cfg.model)
        model, vision = load_llava(cfg.model, tokenizer, cfg.train.precision)
        if own.adapter is not None:
            load_any_adapter(model, own.adapter)
            narrow_forward(model, cfg.train.precision, world.device.type)
        model = model.to(world.device).eval()
        encoder = Encoder(tokenizer, vision, cfg.data)
        with reuse_norms(model) if own.adapter else torch.no_grad():
            evaluate_model(model, encoder, cfg.evaluate, DTYPES[cfg.train.precision], own.output, model_id=cfg.run.name)

    run_script(run)
