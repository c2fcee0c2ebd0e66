"""Score a language model on the benchmarks of its recipe: ``dora evaluate llm --config RECIPE [--adapter FOLDER]``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dora_core.adapters import reuse_norms
from dora_core.engine.build import ready_to_answer
from dora_core.engine.distributed import World
from dora_core.evaluation.results import Metric, average_metric
from dora_core.evaluation.runner import score_tasks
from dora_core.training.script import run_evaluation
from pipelines.llm.config import RECIPES, EvaluateSection, LLMConfig
from pipelines.llm.model import load_model, load_tokenizer


def evaluate_model(
    model: Any,
    tokenizer: Any,
    section: EvaluateSection,
    template: str,
    folder: Path,
    *,
    synced: bool = False,
) -> list[Metric]:
    """Return one accuracy per task of ``section``, then ``llm/average``, their unweighted mean.

    ``score_tasks`` says more. Set ``synced`` under ZeRO-3.
    """
    return score_tasks(
        "llm",
        model,
        tokenizer,
        section,
        folder,
        scoring_settings(section, template),
        extra={"template": template},
        summarize=average,
        synced=synced,
        device=_partitioned_device() if synced else None,
    )


def scoring_settings(section: EvaluateSection, template: str) -> dict[str, Any]:
    """Return the settings that can change a score; where the data lies, and batch sizes, cannot."""
    settings: dict[str, Any] = {"mode": section.mode, "template": template}
    if section.mode == "generate":
        settings |= {"num_beams": section.num_beams, "max_new_tokens": section.max_new_tokens}
    return settings


def average(metrics: list[Metric]) -> list[Metric]:
    """Return ``llm/average``, with the mean levels of guessing and of the commonest answers beside it."""
    levels = {key: sum(metric.extra[key] for metric in metrics) / len(metrics) for key in ("chance", "majority")}
    num_unparsed = sum(metric.extra["num_unparsed"] for metric in metrics)
    extra = {"mode": metrics[0].extra["mode"], **levels, "num_unparsed": num_unparsed}
    return [average_metric("llm/average", metrics, extra=extra)]


def _partitioned_device() -> torch.device | None:
    """Return where ZeRO-3 computes: its parameters may rest elsewhere."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def evaluate(cfg: LLMConfig, world: World, adapter: Path | None, output: Path) -> None:
    """Score ``model.path``, with an adapter if one is given."""
    model = load_model(cfg.model, cfg.train.precision)
    model = ready_to_answer(model, adapter, cfg.train.precision, world.device)
    with reuse_norms(model):
        evaluate_model(model, load_tokenizer(cfg.model), cfg.evaluate, cfg.data.template, output)


def main(arguments: Sequence[str]) -> None:
    """Read the command line and score."""
    run_evaluation("llm", LLMConfig, RECIPES, evaluate, arguments)
