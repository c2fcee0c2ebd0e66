"""Where the numbers of a run go: ``metrics.jsonl`` always, TensorBoard, Weights & Biases, and plots."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from dora_core.config import ConfigError, LogSection


class MetricLog:
    """Writes rows of numbers; made on rank 0 alone."""

    def __init__(self, folder: Path, section: LogSection, run_name: str) -> None:
        self.path = folder / "metrics.jsonl"
        self._board = None
        self._wandb = None
        if section.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))
        if section.wandb_project:
            try:
                import wandb
            except ImportError:
                raise ConfigError(
                    "log.wandb_project is set, but wandb is not installed. Remove it, or run "
                    "pip install 'dora-finetuning[wandb]'."
                ) from None
            identity = folder / "wandb.id"  # a resumed run goes on in the same place
            if not identity.is_file():
                identity.write_text(uuid.uuid4().hex, encoding="utf-8")
            self._wandb = wandb.init(
                project=section.wandb_project, name=run_name, id=identity.read_text(), dir=str(folder), resume="allow"
            )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one row for optimizer step ``step``."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def drop_after(self, step: int) -> None:
        """Forget rows later than ``step``, which a resumed run writes again."""
        drop_rows_after(self.path, step)

    def close(self) -> None:
        """Flush everything."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.jsonl``; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def drop_rows_after(path: Path, step: int) -> None:
    """Rewrite a file of rows such as ``metrics.jsonl`` without those later than ``step``; it need not exist."""
    if path.is_file():
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        aside.replace(path)


def plot_losses(curves: dict[str, Path], picture: Path) -> None:
    """Draw training loss (thin) and validation loss (dots) of one or more ``metrics.jsonl`` files as PNG."""
    figure, axes = _figure()
    for color, (label, path) in enumerate(curves.items()):
        rows = read_metrics(path)
        train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        held = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
        if train:
            axes.plot(*zip(*train, strict=True), color=f"C{color}", linewidth=1, label=label)
        if held:
            axes.plot(*zip(*held, strict=True), "o", color=f"C{color}", markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss per target token", title="Training (lines) and validation (dots)")
    axes.legend()
    figure.savefig(picture, dpi=120)


def plot_accuracies(
    scores: dict[str, dict[str, float]], chance: dict[str, float], picture: Path, chance_label: str = "chance"
) -> None:
    """Draw grouped bars of accuracy in percent, ``scores[method][task]``, with chance as a line, as PNG.

    ``chance_label`` is for another level in its place.
    """
    figure, axes = _figure(width=9)
    tasks = list(chance)
    width = 0.8 / max(1, len(scores))
    for place, (method, values) in enumerate(scores.items()):
        at = [index - 0.4 + (place + 0.5) * width for index in range(len(tasks))]
        axes.bar(at, [100 * values.get(task, 0.0) for task in tasks], width, label=method)
    for index, task in enumerate(tasks):
        at_chance = 100 * chance[task]
        axes.plot(
            [index - 0.4, index + 0.4], [at_chance] * 2, "k--", linewidth=1, label=None if index else chance_label
        )
    axes.set_xticks(range(len(tasks)), tasks, rotation=20)
    axes.set(ylabel="accuracy, %", ylim=(0, 100))
    axes.legend(ncols=min(6, len(scores) + 1), loc="upper center", bbox_to_anchor=(0.5, 1.15))
    figure.savefig(picture, dpi=120)


def plot_curves(
    curves: dict[str, list[tuple[Any, float, float]]],
    names: tuple[str, str, str],
    picture: Path,
    chance: float | None = None,
) -> None:
    """Draw one line per entry of ``curves``, each a list of x, y and y's error bar (0 for none), as PNG.

    ``names`` are those of the axes and the title. Positive numbers of x that span a factor of two or more have a
    logarithmic axis, to base 2 for integers such as ranks; text makes an axis of categories. ``chance`` is a level
    in the unit of y.
    """
    figure, axes = _figure()
    is_text = any(isinstance(x, str) for points in curves.values() for x, _, _ in points)
    for label, points in curves.items():
        x, y, error = zip(*(points if is_text else sorted(points)), strict=True)
        axes.errorbar(x, y, yerr=error if any(error) else None, marker="o", markersize=4, capsize=3, label=label)
    if chance is not None:
        axes.axhline(chance, color="k", linestyle="--", linewidth=1, label="chance")
    if not is_text:
        places = sorted({x for points in curves.values() for x, _, _ in points})
        if places[0] > 0 and places[-1] >= 2 * places[0]:
            axes.set_xscale("log", base=2 if all(isinstance(x, int) for x in places) else 10)
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.minorticks_off()
    axes.set(xlabel=names[0], ylabel=names[1], title=names[2])
    axes.legend()
    figure.savefig(picture, dpi=120)


def subplots(num_rows: int, num_columns: int, width: float = 4, height: float = 3) -> tuple[Any, Any]:
    """Return a figure and its axes [rows, columns], each of ``width`` by ``height`` inches."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def _figure(width: float = 7) -> tuple[Any, Any]:
    figure, ((axes,),) = subplots(1, 1, width, 4)
    return figure, axes
