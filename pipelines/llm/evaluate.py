"""Score a language model on the benchmarks of its recipe: ``dora evaluate llm --config RECIPE [--adapter FOLDER]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dora_core.adapters import load_adapter, reuse_norms
from dora_core.config import load_config, split_arguments
from dora_core.engine.build import narrow_forward
from dora_core.engine.distributed import World
from dora_core.evaluation.evaluator import EvaluationContext
from dora_core.evaluation.results import Metric, average_metric, config_hash, format_table
from dora_core.evaluation.runner import place_among_ranks, run_evaluators
from dora_core.registry import EVALUATORS
from dora_core.training.script import run_script
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
    world_rank: int | None = None,
    world_size: int | None = None,
) -> list[Metric]:
    """Return one accuracy per task of ``section``, then ``llm/average``, their unweighted mean.

    Every rank must call it; every rank gets the same metrics. Rank 0 writes ``results.json`` and
    ``predictions.jsonl`` into ``folder`` and prints the table. ``model`` is the model itself, not an engine around it;
    it comes back in the mode, training or evaluation, in which it was given. Set ``synced`` under ZeRO-3. Rank and
    number of ranks are those of torch.distributed if not given.

    Raises ``ValueError`` for no tasks, an unknown task (with close matches) or missing data, before the first
    forward pass.
    """
    if not section.tasks:
        raise ValueError("evaluate.tasks is []; it must name at least one task. Add one, such as boolq.")
    evaluators = [EVALUATORS.get(f"llm/{task}") for task in section.tasks]
    rank, size = place_among_ranks(world_rank, world_size)
    context = EvaluationContext(
        model=model,
        tokenizer=tokenizer,
        section=section,
        extra={"template": template},
        config_hash=config_hash(scoring_settings(section, template)),
        rank=rank,
        world_size=size,
        synced=synced,
        device=_partitioned_device() if synced else None,
    )
    metrics = run_evaluators(evaluators, context, folder, summarize=average)
    if rank == 0:
        print(format_table(metrics), flush=True)
    return metrics


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


def main(arguments: Sequence[str]) -> None:
    """Score ``model.path``, with the adapter of ``--adapter`` unmerged if given, into ``--output``.

    Started by a launcher on several ranks, each holds the model and scores its share of the rows.
    """
    parser = argparse.ArgumentParser(prog="dora evaluate llm", allow_abbrev=False)
    parser.add_argument("--adapter", type=Path, help="folder of an adapter in PEFT's layout")
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="folder for results.json, predictions.jsonl"
    )
    own, rest = parser.parse_known_args(arguments)
    recipe, overrides = split_arguments(rest)

    def run() -> None:
        cfg = load_config(LLMConfig, recipe, overrides, recipes=RECIPES)
        world = World.start(cfg.deepspeed.timeout_s)
        model = load_model(cfg.model, cfg.train.precision)
        if own.adapter is not None:
            load_adapter(model, own.adapter)
            narrow_forward(model, cfg.train.precision, world.device.type)
        model = model.to(world.device).eval()
        with reuse_norms(model):
            evaluate_model(model, load_tokenizer(cfg.model), cfg.evaluate, cfg.data.template, own.output)

    run_script(run)
