"""Score a LLaVA on the benchmarks of its recipe: ``dora evaluate vlm --config RECIPE [--adapter FOLDER]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dora_core.adapters import reuse_norms
from dora_core.engine.build import DTYPES, Engine, ready_to_answer
from dora_core.engine.distributed import World
from dora_core.evaluation.evaluator import EvaluationContext, Evaluator
from dora_core.evaluation.results import Metric
from dora_core.evaluation.runner import reported_metrics, score_tasks
from dora_core.training.metrics import plot_accuracies
from dora_core.training.run import Run
from dora_core.training.script import run_evaluation
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

    ``score_tasks`` says more; LLaVA's answer files and the submissions come into ``folder`` too. Set ``synced`` under
    ZeRO-3, with the ``device`` to compute on.
    """
    return score_tasks(
        "vlm",
        model,
        encoder.tokenizer,
        section,
        folder,
        scoring_settings(section, encoder.section),
        extra={"answering": Answering(encoder, dtype), "model_id": model_id},
        wrap=ShuffledImages if section.shuffle_images else None,
        columns=COLUMNS,
        synced=synced,
        device=device,
    )


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


def evaluate(cfg: VLMConfig, world: World, adapter: Path | None, output: Path) -> None:
    """Score the recipe's model, with an adapter (in PEFT's layout, or a LLaVA run's) if one is given."""
    tokenizer, precision = load_tokenizer(cfg.model), cfg.train.precision
    model, vision = load_llava(cfg.model, tokenizer, precision)
    model = ready_to_answer(model, adapter, precision, world.device, load_any_adapter)
    encoder = Encoder(tokenizer, vision, cfg.data)
    with reuse_norms(model) if adapter else torch.no_grad():
        evaluate_model(model, encoder, cfg.evaluate, DTYPES[precision], output, model_id=cfg.run.name)


def main(arguments: Sequence[str]) -> None:
    """Read the command line and score."""
    run_evaluation("vlm", VLMConfig, RECIPES, evaluate, arguments)
