"""The folder of a finished run to what a night compares: scores, the loss curve, speed, memory, data and settings."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dora_core.config import read_yaml
from dora_core.evaluation.results import PREDICTIONS_FILE, RESULTS_FILE, Metric, config_hash, read_results
from dora_core.training.checkpoint import CheckpointStore
from dora_core.training.metrics import read_metrics

OUTCOME_FIELDS = ("correct", "score")
"""Fields of a prediction that may be its part of a mean."""
TEXT_FIELDS = (
    ("instruction", "prompt", "question", "source"),
    ("answer", "answers", "targets"),
    ("output_pred", "text", "pred"),
)
"""What shows an example: the question, the right answer and the given one, each the first field that is there."""
MAX_TEXT = 300
NOT_COMPARED = {"run": {"name", "root", "resume"}}
SMALLEST_LOSS = 1e-12


class MeasurementError(ValueError):
    """A run's folder lacks what every finished run leaves."""


@dataclass(frozen=True)
class Outcome:
    """What one example was worth, and what shows it to a reader."""

    value: float
    question: str
    right: str
    given: str


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number of one run."""

    metric: str
    value: float
    """Not finite if the run's own numbers were not."""
    stderr: float | None = None
    n: int = 1
    higher_is_better: bool
    data_hash: str
    """Equal hashes, equal training rows and, for a score, equal evaluation rows: only then may values be compared."""
    evaluation_hash: str = ""
    """Of the rows scored; empty for what is no score."""
    outcomes: list[Outcome] = field(default_factory=list)
    """One per example, in order, if their mean is the value; else none."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Everything a finished run is compared by."""

    hardware: str
    commit: str
    versions: dict[str, str]
    config: dict[str, Any]
    config_hash: str
    data_hash: str
    num_rows: int
    curve: list[tuple[int, float]]
    """Logged optimizer steps and their training losses per target token."""
    measurements: list[Measurement]
    golden: str = ""
    """Where the curve is from that ``loss_distance`` was measured to; empty if there is none but this run's."""


def measure_run(folder: Path) -> Measured:
    """Return what a run left in ``folder``; raises ``MeasurementError`` if it did not get to its end."""
    for name in ("metrics.jsonl", "environment.json", "config.yaml"):
        if not (folder / name).is_file():
            raise MeasurementError(f"{folder} has no {name}; a finished run must leave it. Look into the run's log.")
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    data_hash, num_rows = training_data(folder)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    config = compared_settings(read_yaml(folder / "config.yaml"))
    return Measured(
        hardware=describe_hardware(environment),
        commit=environment["commit"],
        versions={"python": environment["python"], **environment["versions"]},
        config=config,
        config_hash=config_hash(config),
        data_hash=data_hash,
        num_rows=num_rows,
        curve=[(row["step"], row["loss"]) for row in rows],
        measurements=[
            *measure_scores(folder / "results" / "after", data_hash),
            *measure_speed(rows, data_hash),
            measure_export(folder, data_hash),
        ],
    )


def describe_hardware(environment: dict[str, Any]) -> str:
    """Return what speed depends on: the device or processor, how many CPUs, and the number of ranks."""
    return f"{environment['hardware']}, {environment['num_cpus']} CPUs, {environment['world_size']} ranks"


def compared_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings without those that say where it lies and what it shows meanwhile."""
    return {
        name: {key: value for key, value in values.items() if key not in NOT_COMPARED.get(name, ())}
        if isinstance(values, dict)
        else values
        for name, values in config.items()
        if name != "log"
    }


def training_data(folder: Path) -> tuple[str, int]:
    """Return hash and number of the training rows, as the run's last checkpoint names them."""
    store = CheckpointStore(folder / "checkpoints")
    step = store.newest(lambda text: None)
    if step is None:
        raise MeasurementError(f"{folder} has no checkpoint that verifies; a finished run must. Look into its log.")
    text, _, count = str(store.facts(step)["data"]).partition(", ")
    return text, int(count.split()[0])


def measure_scores(folder: Path, data_hash: str) -> list[Measurement]:
    """Return the scores of a results folder with their examples; none if the run did not score."""
    if not (folder / RESULTS_FILE).is_file():
        return []
    with (folder / PREDICTIONS_FILE).open(encoding="utf-8") as file:
        predictions = [json.loads(line) for line in file]
    return [
        Measurement(
            metric=f"{metric.name}:{metric.metric}",
            value=metric.value,
            stderr=metric.stderr,
            n=metric.n,
            higher_is_better=metric.higher_is_better,
            data_hash=f"{data_hash}+{metric.dataset_hash}",
            evaluation_hash=metric.dataset_hash,
            outcomes=outcomes_of(metric, predictions),
        )
        for metric in read_results(folder)
    ]


def outcomes_of(metric: Metric, predictions: Sequence[dict[str, Any]]) -> list[Outcome]:
    """Return the examples whose mean ``metric`` is, or none if it is another function of them."""
    own = [row for row in predictions if row.get("task") == metric.name]
    for name in OUTCOME_FIELDS:
        if own and all(isinstance(row.get(name), int | float) for row in own):
            values = [float(row[name]) for row in own]
            if math.isclose(math.fsum(values) / len(values), metric.value, rel_tol=1e-9, abs_tol=1e-12):
                return [
                    Outcome(value, *(_first(row, names) for names in TEXT_FIELDS))
                    for row, value in zip(own, values, strict=True)
                ]
    return []


def measure_speed(rows: Sequence[dict[str, Any]], data_hash: str) -> list[Measurement]:
    """Return tokens/s, the share of time spent waiting for data and, where it was logged, the peak in GiB.

    The first logged row is left out, unless it is the only one: it has the first step's compilations in it. Tokens/s
    is the median of the logged rates, whose standard error is 1.2533 x 1.4826 x (median absolute deviation) / sqrt(n),
    that of a normal distribution's median; a mean would follow one disturbed step.
    """
    steady = list(rows[1:] or rows)
    if not steady:
        return []
    rates = [row["tokens_per_s"] for row in steady]
    median = statistics.median(rates)
    spread = 1.4826 * statistics.median(abs(rate - median) for rate in rates)
    waits = [row["data_wait"] for row in steady]
    found = [
        Measurement(
            metric="tokens_per_s",
            value=median,
            stderr=1.2533 * spread / math.sqrt(len(rates)),
            n=len(rates),
            higher_is_better=True,
            data_hash=data_hash,
        ),
        Measurement(
            metric="data_wait",
            value=statistics.fmean(waits),
            stderr=statistics.pstdev(waits) / math.sqrt(len(waits)),
            n=len(waits),
            higher_is_better=False,
            data_hash=data_hash,
        ),
    ]
    peaks = [row["peak_gib"] for row in rows if "peak_gib" in row]
    if peaks:
        found.append(Measurement(metric="peak_gib", value=max(peaks), higher_is_better=False, data_hash=data_hash))
    return found


def measure_export(folder: Path, data_hash: str) -> Measurement:
    """Return how many numbers the exported adapter or model holds: fewer mean that something trained was lost."""
    files = sorted([*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")])
    if not files:
        raise MeasurementError(f"{folder} holds neither adapter nor model; a finished run must. Look into its log.")
    count = 0
    for path in files:
        with safe_open(path, framework="numpy") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)
    return Measurement(metric="exported_values", value=count, higher_is_better=True, data_hash=data_hash)


def curve_distance(curve: Sequence[tuple[int, float]], golden: Sequence[tuple[int, float]]) -> float | None:
    """Return the root mean square of the difference of log losses over the steps that both curves have.

    It is about the relative difference of the losses: 0.01 is one percent. Infinite where a loss is not finite; None
    without a common step.
    """
    other = dict(golden)
    pairs = [(loss, other[step]) for step, loss in curve if step in other]
    if not pairs:
        return None
    if not all(math.isfinite(loss) for pair in pairs for loss in pair):
        return math.inf
    logs = [[math.log(max(loss, SMALLEST_LOSS)) for loss in pair] for pair in pairs]
    return math.sqrt(math.fsum((new - old) ** 2 for new, old in logs) / len(logs))


def _first(row: dict[str, Any], names: Sequence[str]) -> str:
    value = next((row[name] for name in names if row.get(name) is not None), "")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
