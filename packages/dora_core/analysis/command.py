"""``dora analyze A B [C ...]``: magnitude and direction change of every adapted weight from A to the others."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dora_core.analysis.correlation import Correlation
from dora_core.analysis.figures import draw_layers, draw_scatter, draw_steps
from dora_core.analysis.points import Point, State, correlations, measure, states, write_csv
from dora_core.analysis.weights import open_weights
from dora_core.config import require

Correlations = Mapping[tuple[str, str], Correlation]
"""By method and role."""

DESCRIPTION = """\
A is the state before, usually the base model. Each other argument is a later state: the folder of a model, an adapter,
a checkpoint (.../checkpoints/step-00000100), or a run, which means all of its checkpoints. NAME=PATH names a method;
given several times, as for runs with other seeds, its points are taken together.

    dora analyze base-model runs/my_run
    dora analyze base-model lora=runs/lora dora=runs/dora --weights "q_proj|v_proj" --output runs/analysis
"""


def main(arguments: Sequence[str]) -> None:
    """Measure, write CSV, JSON and figures to ``--output``, and print a table."""
    parser = argparse.ArgumentParser(
        prog="dora analyze",
        allow_abbrev=False,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", metavar="A")
    parser.add_argument("after", metavar="B", nargs="+")
    parser.add_argument("--base", help="model that adapters were trained on; A, if it is one, or what they name")
    parser.add_argument("--weights", help="regular expression to search in names; the adapted weights if not given")
    parser.add_argument("--output", type=Path, default=Path("runs/analysis"))
    own = parser.parse_args(arguments)
    analyze(own.before, own.after, own.output, base=own.base, pattern=own.weights)


def analyze(
    before: str, after: Sequence[str], output: Path, *, base: str | None = None, pattern: str | None = None
) -> tuple[Correlations, Correlations]:
    """Do what the command does, and return the correlations over all points and within steps.

    Raises ``ValueError`` for what cannot be compared.
    """
    first, *surplus = states(before)
    require(
        not surplus, "A", before, "one state", f"Give one of its {len(surplus) + 1} checkpoints, or the base model."
    )
    later: list[State] = [state for argument in after for state in states(argument)]
    start = open_weights(first.path, base)
    if base is None and not start.trained():
        base = first.path
    points = []
    for point in measure(start, later, base, pattern):
        points.append(point)
        if sys.stderr.isatty():
            print(f"\r{len(points)} weights ", end="", file=sys.stderr, flush=True)
    found, within = correlations(points), correlations(points, within_steps=True)
    output.mkdir(parents=True, exist_ok=True)
    write_csv(points, output / "changes.csv")
    content = {
        "before": first.path,
        "after": [asdict(state) for state in later],
        "correlations": _records(found),
        "correlations_within_steps": _records(within),
    }
    (output / "summary.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draw_scatter(points, found, output / "scatter.png")
    draw_layers(points, output / "layers.png")
    if any(point.step is not None for point in points):
        draw_steps(points, output / "steps.png")
    print(table(points, found, within))
    print(f"changes.csv, summary.json and figures are in {output}")
    return found, within


def table(points: Sequence[Point], correlated: Correlations, within: Correlations) -> str:
    """Return mean changes and their correlation by method and role, as text."""
    lines = [f"{'':<28}{'points':>8}{'mean ΔM':>12}{'mean ΔD':>12}   {'correlation [95 %]':<24}within steps"]
    for (method, role), found in correlated.items():
        own = [point.change for point in points if (point.method, point.change.role) == (method, role)]
        means = [sum(getattr(change, key) for change in own) / len(own) for key in ("delta_m", "delta_d")]
        cells = "".join(f"{mean:>12.3g}" for mean in means)
        lines.append(f"{method + ' ' + role:<28}{len(own):>8}{cells}   {found!s:<24}{within[method, role]}")
    return "\n".join(lines)


def _records(found: Correlations) -> list[dict[str, Any]]:
    return [{"method": method, "role": role, **asdict(value)} for (method, role), value in found.items()]
