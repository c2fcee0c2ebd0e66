"""Run evaluators with the rows split over the ranks, so that the scores do not depend on how many there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from dora_core.adapters import agreement
from dora_core.evaluation.evaluator import EvaluationContext, Evaluator, FileWriter
from dora_core.evaluation.results import (
    DEFAULT_COLUMNS,
    Metric,
    average_metric,
    commit_hash,
    config_hash,
    dataset_hash,
    format_table,
    write_results,
)
from dora_core.registry import EVALUATORS

T = TypeVar("T")


def score_tasks(
    pipeline: str,
    model: Any,
    tokenizer: Any,
    section: Any,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    extra: Mapping[str, Any] | None = None,
    wrap: Callable[[Evaluator], Evaluator] | None = None,
    summarize: Callable[[list[Metric]], list[Metric]] | None = None,
    columns: Sequence[str] = DEFAULT_COLUMNS,
    synced: bool = False,
    device: Any = None,
) -> list[Metric]:
    """Return the metrics of the pipeline's evaluators that ``section.tasks`` names, then those of ``summarize``.

    Every rank must call it; every rank gets the same metrics. Rank 0 writes ``folder`` and prints a table of
    ``columns``. ``model`` is the model itself, not an engine around it, and comes back in its own mode. ``settings``
    are those that can change a score; ``extra``, ``synced`` and ``device`` are the context's. ``wrap`` may put
    something around each evaluator; without ``summarize`` there is the average that ``average_of_reported`` tells of.

    Raises ``ValueError`` for no tasks, an unknown task (with close matches) or missing data, before the first
    forward pass.
    """
    evaluators = evaluators_of(pipeline, section.tasks)
    rank, size = place_among_ranks()
    context = EvaluationContext(
        model=model,
        tokenizer=tokenizer,
        section=section,
        extra=extra or {},
        config_hash=config_hash(settings),
        rank=rank,
        world_size=size,
        synced=synced,
        device=device,
    )
    evaluators = [wrap(evaluator) for evaluator in evaluators] if wrap else evaluators
    summarize = summarize or partial(average_of_reported, pipeline=pipeline)
    metrics = run_evaluators(evaluators, context, folder, summarize=summarize)
    if rank == 0:
        print(format_table(metrics, columns), flush=True)
    return metrics


def evaluators_of(pipeline: str, tasks: Sequence[str]) -> list[Evaluator]:
    """Return evaluators by their names without the pipeline's prefix. Raises ``ValueError`` for none, or unknown."""
    if not tasks:
        some = EVALUATORS.names(pipeline)[0].removeprefix(f"{pipeline}/")
        raise ValueError(f"evaluate.tasks is []; it must name at least one benchmark. Add one, such as {some}.")
    return [EVALUATORS.get(f"{pipeline}/{task}") for task in tasks]


def run_evaluators(
    evaluators: Sequence[Evaluator],
    context: EvaluationContext,
    folder: Path,
    *,
    summarize: Callable[[list[Metric]], list[Metric]] | None = None,
) -> list[Metric]:
    """Run ``evaluators`` one after the other and return their metrics, then those of ``summarize``.

    Every rank must call it; every rank gets the same metrics. All rows are loaded before the first forward pass, so
    that a missing file ends the run at once. Rank 0 writes ``folder`` anew after each evaluator, so that an
    interrupted run leaves what it has finished, and then lets the evaluator write files of its own. A failure to read
    or to write on one rank raises ``ValueError`` on all of them.
    """
    loaded = [(evaluator, agree(partial(evaluator.load, context.section), context)) for evaluator in evaluators]
    commit = commit_hash()
    metrics: list[Metric] = []
    predictions: list[dict[str, Any]] = []
    for place, (evaluator, rows) in enumerate(loaded, 1):
        new_metrics, new_predictions = run_evaluator(evaluator, rows, context, commit=commit)
        metrics += new_metrics
        predictions += new_predictions
        on_main(partial(write_results, folder, metrics, predictions), context)
        if isinstance(evaluator, FileWriter):
            on_main(partial(evaluator.write_files, new_predictions, folder, context), context)
        if context.rank == 0:
            print(f"[{place}/{len(loaded)}] {evaluator.name}: {describe_scores(new_metrics)}", flush=True)
    if summarize is not None:
        metrics += summarize(metrics)
        on_main(partial(write_results, folder, metrics, predictions), context)
    return metrics


def describe_scores(metrics: Sequence[Metric]) -> str:
    """Return one evaluator's scores in a few words: those under the name of its first, the reported, metric."""
    if not metrics:
        return "no scores, the answers are not known here"
    return ", ".join(f"{each.metric} {each.value:.4f}" for each in metrics if each.name == metrics[0].name)


def run_evaluator(
    evaluator: Evaluator, rows: Sequence[dict[str, Any]], context: EvaluationContext, *, commit: str = ""
) -> tuple[list[Metric], list[dict[str, Any]]]:
    """Return the metrics and the predictions of one evaluator, the latter in the order of ``rows``.

    Rank r predicts ``rows[r::world_size]``; every rank must call it, and every rank gets everything. Each prediction
    gains the row's place as ``index``. Raises ``ValueError`` on all ranks if their rows differ.
    """
    rows_hash = dataset_hash(rows)
    hashes = gather_objects(rows_hash, context)
    if len(set(hashes)) > 1:
        raise ValueError(
            f"{evaluator.name} has different rows on different ranks ({', '.join(item[:12] for item in hashes)}); they "
            "must be the same. Put the same data files on every node."
        )
    share = list(rows[context.rank :: context.world_size])
    predicted = evaluator.predict(share, context)
    assert len(predicted) == len(share), f"{evaluator.name} made {len(predicted)} predictions for {len(share)} rows"
    shares = gather_objects(predicted, context)
    predictions = [
        {**shares[index % context.world_size][index // context.world_size], "index": index}
        for index in range(len(rows))
    ]
    metrics = [
        replace(metric, dataset_hash=rows_hash, config_hash=context.config_hash, commit=commit)
        for metric in evaluator.score(predictions)
    ]
    return metrics, predictions


def reported_metrics(metrics: Sequence[Metric], pipeline: str) -> list[Metric]:
    """Return the first metric of each of the pipeline's benchmarks, the one that papers report."""
    names = EVALUATORS.names(pipeline)
    first = {metric.name: metric for metric in reversed(metrics) if metric.name in names}
    return [first[name] for name in dict.fromkeys(metric.name for metric in metrics) if name in first]


def average_of_reported(metrics: Sequence[Metric], pipeline: str) -> list[Metric]:
    """Return ``<pipeline>/average``: the unweighted mean over benchmarks of the reported metrics, as papers print it.

    It mixes what they report, such as accuracies with an F1 or CIDEr, and has the mean of their ``majority`` levels.
    There is none where nothing could be scored.
    """
    reported = reported_metrics(metrics, pipeline)
    if not reported:
        return []
    alike = [replace(metric, metric="score") for metric in reported]
    levels = [metric.extra["majority"] for metric in reported]
    return [average_metric(f"{pipeline}/average", alike, extra={"majority": sum(levels) / len(levels)})]


def place_among_ranks(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Return rank and number of ranks: as given, else those of torch.distributed, else (0, 1).

    Raises ``ValueError`` for a place that does not exist, and for several ranks that cannot talk to each other.
    """
    running = dist.is_available() and dist.is_initialized()
    rank = (dist.get_rank() if running else 0) if rank is None else rank
    world_size = (dist.get_world_size() if running else 1) if world_size is None else world_size
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of {world_size}; it must be from 0 to {world_size - 1}. Number ranks from 0.")
    if world_size > 1 and (not running or dist.get_world_size() != world_size):
        connected = dist.get_world_size() if running else 1
        raise ValueError(
            f"world_size is {world_size} but {connected} ranks are connected; the two must be equal to gather "
            "predictions. Initialize torch.distributed first, or leave world_size out."
        )
    return rank, world_size


def equal_calls(num_items: int, batch_size: int, context: EvaluationContext) -> int | None:
    """Return how many batches the rank with most items has, or None where ranks need not move together.

    Every rank must call it, also with no items; pass the result as ``num_calls`` to the functions of ``generation``.
    """
    if not context.synced:
        return None
    return max(gather_objects(math.ceil(num_items / batch_size), context))


def agree(work: Callable[[], T] | None, context: EvaluationContext) -> T | None:
    """Do ``work`` on this rank, None for nothing, and return its result; every rank must call it.

    If it fails on any of several ranks, all raise ``RankFailureError``, a ``ValueError``, so that none is left
    waiting; what fails on an only rank is raised as it is.
    """
    if context.world_size == 1:
        return work() if work is not None else None
    return agreement.agree(work, agreement.gather_objects, context.rank)


def on_main(work: Callable[[], Any], context: EvaluationContext) -> None:
    """Do ``work`` on rank 0 alone; every rank must call it, and its failure raises on all, as in ``agree``."""
    agree(work if context.rank == 0 else None, context)


def gather_objects(item: Any, context: EvaluationContext) -> list[Any]:
    """Return every rank's ``item``, by rank; every rank must call it."""
    return [item] if context.world_size == 1 else agreement.gather_objects(item)
