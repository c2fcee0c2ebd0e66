"""What an evaluation leaves behind: metric records, the predictions they come from, and a table for the screen."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.jsonl"
FORMAT_VERSION = 1
DEFAULT_COLUMNS = ("name", "metric", "value", "stderr", "n", "chance", "majority", "mode")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One measured number with what is needed to compare it with another one."""

    name: str
    """The evaluator's registry name, such as ``llm/boolq``."""
    metric: str
    """What was measured, such as ``accuracy``."""
    value: float
    stderr: float | None
    """Standard error of ``value``, in its unit; None where no formula applies."""
    n: int
    """Number of rows behind ``value``."""
    higher_is_better: bool = True
    dataset_hash: str = ""
    """``dataset_hash`` of the scored rows: equal hashes, equal questions."""
    config_hash: str = ""
    """``config_hash`` of the settings that can change the score."""
    commit: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further plain values, such as chance and majority levels or the mode."""


def accuracy_metric(name: str, correct: Sequence[bool], *, extra: Mapping[str, Any] | None = None) -> Metric:
    """Return the share of true entries in ``correct`` as a metric record without hashes.

    The standard error is sqrt(p (1 - p) / n): the binomial one, which divides by n. The sample form with n - 1, as
    lm-evaluation-harness reports it, is larger by the factor sqrt(n / (n - 1)). Raises ``ValueError`` for no rows.
    """
    n = len(correct)
    if n == 0:
        raise ValueError(f"{name} has 0 predictions; an accuracy needs at least one. Score at least one row.")
    value = sum(map(bool, correct)) / n
    stderr = math.sqrt(value * (1 - value) / n)
    return Metric(name=name, metric="accuracy", value=value, stderr=stderr, n=n, extra=dict(extra or {}))


def mean_metric(name: str, metric: str, values: Sequence[float], *, extra: Mapping[str, Any] | None = None) -> Metric:
    """Return the mean of ``values`` as a metric record without hashes, with the standard error sd / sqrt(n).

    The standard deviation divides by n, so that values of 0 and 1 give what ``accuracy_metric`` gives. Raises
    ``ValueError`` for no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError(f"{name} has 0 values; a mean needs at least one. Score at least one row.")
    value = math.fsum(values) / n
    stderr = math.sqrt(math.fsum((each - value) ** 2 for each in values)) / n
    return Metric(name=name, metric=metric, value=value, stderr=stderr, n=n, extra=dict(extra or {}))


def average_metric(name: str, metrics: Sequence[Metric], *, extra: Mapping[str, Any] | None = None) -> Metric:
    """Return the unweighted mean of ``metrics``, whatever their numbers of rows.

    The standard error is that of a mean of independent values: sqrt(sum of squares) / number of metrics. The hash
    covers the hashes of all parts, ``n`` is the sum, and ``extra["parts"]`` names them. Raises ``ValueError`` for an
    empty list and for metrics of different kinds.
    """
    kinds = sorted({(metric.metric, metric.higher_is_better) for metric in metrics})
    if len(kinds) != 1:
        raise ValueError(
            f"{name} would average {', '.join(kind for kind, _ in kinds) or 'nothing'}; it must average one kind of "
            "metric. Average each kind by itself."
        )
    first = metrics[0]
    errors = [metric.stderr for metric in metrics]
    stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(metrics)
    return Metric(
        name=name,
        metric=first.metric,
        value=sum(metric.value for metric in metrics) / len(metrics),
        stderr=stderr,
        n=sum(metric.n for metric in metrics),
        higher_is_better=first.higher_is_better,
        dataset_hash=_sha256([metric.dataset_hash for metric in metrics]),
        config_hash=first.config_hash,
        commit=first.commit,
        extra={"parts": [metric.name for metric in metrics], **(extra or {})},
    )


def dataset_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the sha256 over ``rows`` in order, each as JSON with sorted keys; values must be plain JSON values."""
    return _sha256(_canonical(row) for row in rows)


def config_hash(settings: Mapping[str, Any]) -> str:
    """Return the sha256 over settings of plain JSON values, whatever the order of their keys."""
    return _sha256([_canonical(settings)])


def commit_hash(folder: Path | None = None) -> str:
    """Return the commit of the repository at ``folder``, with ``-dirty`` if a tracked file differs from it.

    Without a folder: the repository that tracks this file, so that an installation inside somebody else's
    repository is not taken for it. ``unknown`` outside of a repository, before its first commit, and without git.
    """
    here = Path(__file__)
    if folder is None and _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return "unknown"
    where = here.parent if folder is None else folder
    commit = _git(where, "rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    return commit + ("-dirty" if _git(where, "status", "--porcelain", "--untracked-files=no") else "")


def write_results(folder: Path, metrics: Sequence[Metric], predictions: Iterable[Mapping[str, Any]]) -> None:
    """Write ``predictions.jsonl`` and then ``results.json`` into ``folder``, each replaced in one step.

    A reader never sees half a file, and results that exist have their predictions. Call it on one rank only. Raises
    ``ValueError`` for a value that JSON has no word for, such as NaN.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / PREDICTIONS_FILE, (_line(prediction) for prediction in predictions))
    document = {"format": FORMAT_VERSION, "metrics": [asdict(metric) for metric in metrics]}
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(folder / RESULTS_FILE, [text + "\n"])


def replace_file(path: Path, lines: Iterable[str]) -> None:
    """Write ``lines`` (with their ends) to ``path`` in one step."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, which then takes the place of ``path``: a reader sees the old file or the new, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_results(folder: Path) -> list[Metric]:
    """Return the metrics that ``write_results`` left in ``folder``.

    Raises ``ValueError`` if there are none or if another version of the format wrote them.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {RESULTS_FILE}; it must be the folder of a finished evaluation. Evaluate first."
        )
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("format") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {document.get('format')!r}; this version reads {FORMAT_VERSION}. Evaluate again."
        )
    return [Metric(**record) for record in document["metrics"]]


def format_table(metrics: Sequence[Metric], columns: Sequence[str] = DEFAULT_COLUMNS) -> str:
    """Return ``metrics`` as aligned plain text, one line each under a header.

    A column is a field of ``Metric`` or a key of ``extra``; a metric without it shows a dash. Real numbers have four
    decimals, and are shares, not percent, where the metric is one.
    """
    records = [{**metric.extra, **asdict(metric)} for metric in metrics]
    table = [list(columns), *([_cell(record.get(column)) for column in columns] for record in records)]
    widths = [max(len(line[place]) for line in table) for place in range(len(columns))]
    numeric = [any(isinstance(record.get(column), int | float) for record in records) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in table
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _sha256(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8") + b"\n")
    return digest.hexdigest()


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, or None if it fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
