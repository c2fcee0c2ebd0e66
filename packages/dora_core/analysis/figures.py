"""The figures of an analysis: scatter of both changes, bars by layer, curves over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dora_core.analysis.correlation import Correlation
from dora_core.analysis.decomposition import Change
from dora_core.analysis.points import Point
from dora_core.training.metrics import subplots


def draw_scatter(points: Sequence[Point], found: Mapping[tuple[str, str], Correlation], picture: Path) -> None:
    """Draw ΔM against ΔD, a panel for each method (rows) and role (columns), with correlations, as PNG (Figure 2)."""
    methods, roles = ([*dict.fromkeys(values)] for values in zip(*((p.method, p.change.role) for p in points)))  # noqa: B905
    figure, panels = subplots(len(methods), len(roles))
    for row, method in enumerate(methods):
        for column, role in enumerate(roles):
            axes = panels[row][column]
            own = [p for p in points if (p.method, p.change.role) == (method, role)]
            for color, step in enumerate(_steps(own)):
                at = [(p.change.delta_d, p.change.delta_m) for p in own if p.step == step]
                axes.plot(
                    *zip(*at, strict=True), "o", color=f"C{color}", label=None if step is None else f"step {step}"
                )
            axes.set_title(f"{method}, {role}: r = {found[method, role]}", fontsize=9)
            axes.set(xlabel="direction change ΔD", ylabel="magnitude change ΔM")
            axes.ticklabel_format(scilimits=(-3, 4))
            if any(p.step is not None for p in own):
                axes.legend(fontsize=7)
    figure.savefig(picture, dpi=120)


def draw_layers(points: Sequence[Point], picture: Path) -> None:
    """Draw both changes of each layer at a method's last step, the mean over runs, a row of panels for each role."""
    roles, methods = ([*dict.fromkeys(values)] for values in zip(*((p.change.role, p.method) for p in points)))  # noqa: B905
    figure, panels = subplots(len(roles), 2, width=6, height=2.2)
    width = 0.8 / len(methods)
    for row, role in enumerate(roles):
        for place, method in enumerate(methods):
            own = [p for p in points if (p.method, p.change.role) == (method, role)]
            last: dict[str, list[Change]] = {}
            *_, last_step = _steps(own)
            for p in own:
                if p.step == last_step:
                    last.setdefault(p.change.name, []).append(p.change)
            at = [index - 0.4 + (place + 0.5) * width for index in range(len(last))]
            for axes, key in zip(panels[row], ("delta_m", "delta_d"), strict=True):
                means = [sum(getattr(change, key) for change in changes) / len(changes) for changes in last.values()]
                axes.bar(at, means, width, label=method)
                ticks = ["-" if changes[0].layer is None else str(changes[0].layer) for changes in last.values()]
                axes.set_xticks(range(len(last)), ticks, fontsize=6)
                axes.set_title(f"{'ΔM' if key == 'delta_m' else 'ΔD'} of {role} by layer", fontsize=9)
    panels[0][0].legend(fontsize=7)
    figure.savefig(picture, dpi=120)


def draw_steps(points: Sequence[Point], picture: Path) -> None:
    """Draw both changes over steps, the mean over layers, a line for each method and role, as PNG."""
    figure, ((left, right),) = subplots(1, 2, width=6, height=4)
    for method, role in dict.fromkeys((p.method, p.change.role) for p in points):
        own = [p for p in points if (p.method, p.change.role) == (method, role) and p.step is not None]
        steps = _steps(own)
        for axes, key in ((left, "delta_m"), (right, "delta_d")):
            by_step = [[getattr(p.change, key) for p in own if p.step == step] for step in steps]
            axes.plot(steps, [sum(values) / len(values) for values in by_step], "o-", label=f"{method}, {role}")
    left.set(xlabel="optimizer step", ylabel="magnitude change ΔM")
    right.set(xlabel="optimizer step", ylabel="direction change ΔD")
    left.legend(fontsize=7)
    figure.savefig(picture, dpi=120)


def _steps(points: Sequence[Point]) -> list[int | None]:
    return sorted({p.step for p in points}, key=lambda step: -1 if step is None else step)
