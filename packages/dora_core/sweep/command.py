"""``dora sweep [PIPELINE] RECIPE --section.field v1,v2 ...``: a grid of runs, their table and their picture."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from dora_core.config import require
from dora_core.engine.peers import EXIT_STOPPED
from dora_core.evaluation.results import commit_hash
from dora_core.registry import EVALUATORS, PIPELINES, pipeline_packages, unknown_name
from dora_core.sweep.grid import Grid, Point, build_grid
from dora_core.sweep.report import collect, write_report
from dora_core.sweep.runs import Outcome, read_outcome, refuse_changed, run_point
from dora_core.training.folder import lock_folder
from dora_core.training.jobs import run_jobs
from dora_core.training.launcher import Stop, summary, training_script

HELP = """
A field with several values, separated by commas, spans the grid; one with a single value holds for every run, and a
YAML list such as [a,b] is one value. Each run is a process of its own under the deepspeed launcher and is scored at its
end. The same command again runs what is missing: finished runs stay, interrupted ones go on from their checkpoints.

  dora sweep llm tiny --adapter.rank 4,8,16 --run.seed 0,1,2 --adapter.kind lora,dora

leaves runs/sweep/tiny/ with sweep.json, table.md, sweep.png and a folder and a log for every run. The exit status is 1
if a run failed or ran out of time, and 75 if the sweep was told to stop (Ctrl-C, SIGTERM).
"""


def main(arguments: Sequence[str]) -> None:
    """Run or go on with a sweep; ``arguments`` begin with pipeline and recipe.

    Raises ``ValueError`` before the first run if a point of the grid is not valid, if ``--output`` holds other work, or
    if nothing can give the metric.
    """
    own, overrides = _parser().parse_known_args(arguments)
    limit = own.time_limit
    require(limit is None or 0 < limit < math.inf, "--time-limit", limit, "a positive number of seconds")
    require(own.jobs >= 1, "--jobs", own.jobs, "1 or more")
    if own.num_gpus is None:
        own.num_gpus = max(1, torch.cuda.device_count() // own.jobs)
    require(own.num_gpus >= 1, "--num_gpus", own.num_gpus, "1 or more", "Without a GPU it counts processes.")
    pipeline = PIPELINES.get(own.pipeline)
    output = own.output or Path("runs") / "sweep" / Path(own.recipe).stem
    grid = build_grid(pipeline, own.recipe, overrides, output, own.together, own.num_gpus)
    if own.metric is not None:
        _refuse_unknown_metric(own.metric, own.pipeline, grid)
    for point in grid.points:
        refuse_changed(pipeline, point)
    script = training_script(pipeline_packages()[own.pipeline])
    output.mkdir(parents=True, exist_ok=True)
    about = {
        "command": shlex.join(["dora", "sweep", *arguments]),
        "pipeline": own.pipeline,
        "recipe": own.recipe,
        "commit": commit_hash(),
    }

    def report() -> str:
        return write_report(grid, collect(grid, output, own.metric), output, about)

    with lock_folder(output, "give another --output"):
        try:
            _run_all(grid, script, output, own, report)
        except KeyboardInterrupt:
            print(report() + f"\n\nStopped. The same command goes on; everything is in {output}.", flush=True)
            raise SystemExit(EXIT_STOPPED) from None
        print(report() + f"\n\nThe table, its numbers and the picture are in {output}.", flush=True)
    if any(read_outcome(output / point.name).status != "finished" for point in grid.points):
        raise SystemExit(1)


def _run_all(grid: Grid, script: Path | str, output: Path, own: argparse.Namespace, report: Callable[[], str]) -> None:
    """Run what is not finished, ``--jobs`` at a time; failures stop nothing. Writes the report after each run."""
    missing = [point for point in grid.points if read_outcome(output / point.name).status != "finished"]
    counts = " x ".join(f"{len(grid.values(axis[0]))} {' with '.join(axis)}" for axis in grid.axes)
    print(f"{len(grid.points)} runs in {output}: {counts}. {len(grid.points) - len(missing)} are finished.", flush=True)

    def run(number: int, point: Point, place: int, stop: Stop) -> tuple[Point, Outcome]:
        print(f"[{number}/{len(missing)}] {point.name}", flush=True)
        return point, run_point(script, point, own.num_gpus, own.time_limit, place, stop)

    def done(result: tuple[Point, Outcome]) -> None:
        point, outcome = result
        indent = " " * 6 if own.jobs == 1 else f"{point.name}: "
        if outcome.status == "finished":
            print(indent + summary(output / point.name, outcome.seconds), flush=True)
        else:
            log = output / f"{point.name}.log"
            errors = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("error: ")]
            said = "".join(f"\n      {line}" for line in errors[-1:])
            print(f"{indent}{outcome.status}, exit status {outcome.exit_status}; its log is {log}{said}", flush=True)
        report()

    run_jobs([partial(run, number, point) for number, point in enumerate(missing, 1)], own.jobs, done)


def _refuse_unknown_metric(name: str, pipeline: str, grid: Grid) -> None:
    """Raise before hours of training if no evaluator of every run can give the metric."""
    wanted = name.partition(":")[0].removeprefix(f"{pipeline}/")
    every = [name.removeprefix(f"{pipeline}/") for name in EVALUATORS.names(pipeline)]
    tasks = [set(getattr(point.config.evaluate, "tasks", every)) for point in grid.points]
    known = sorted(f"{pipeline}/{task}" for task in {"average", *set.intersection(*tasks)})
    if not any(f"{pipeline}/{wanted}-".startswith(f"{name}-") for name in known):  # pope-random is a part of pope
        raise unknown_name("metric", name, known, " It must be scored by the evaluate.tasks of every run.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dora sweep",
        usage="dora sweep [PIPELINE] RECIPE --section.field v1,v2 ... [option ...]",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("pipeline", help=argparse.SUPPRESS)
    parser.add_argument("recipe", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="folder of the sweep (runs/sweep/RECIPE)")
    parser.add_argument("--metric", help="what to compare, such as boolq (the last of the results: the average)")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop a run after so long (no limit)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which take the GPUs in turn (1)")
    parser.add_argument("--num_gpus", type=int, help="ranks of a run (all GPUs, or each job's share of them)")
    parser.add_argument(
        "--together",
        action="append",
        default=[],
        metavar="FIELD,FIELD",
        help="fields that take their first values together, then their second, such as adapter.rank,adapter.alpha",
    )
    return parser
