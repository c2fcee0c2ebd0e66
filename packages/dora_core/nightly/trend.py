"""A metric's trend as inline SVG: earlier nights, this one, the reference and its band. Written by hand, no scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from dora_core.nightly.rows import Row
from dora_core.nightly.texts import number

WIDTH, HEIGHT = 320, 96
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 20
MAX_NIGHTS = 60


def trend_plot(row: Row) -> str:
    """Return the plot of a row's value over its last nights, oldest left; empty if it has no finite value."""
    points = [(past.value, past.verdict, past.time[:10]) for past in row.trend][-MAX_NIGHTS + 1 :]
    if row.value is not None:
        points.append((row.value, row.verdict, "this night"))
    points = [point for point in points if math.isfinite(point[0])]
    if not points:
        return ""
    levels = [value for value, _, _ in points]
    if row.reference is not None:
        levels += [row.reference, row.reference - (row.band or 0.0), row.reference + (row.band or 0.0)]
    low, high = min(levels), max(levels)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - margin, high + margin

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def x(place: int) -> float:
        return LEFT + (place + 0.5) / len(points) * (WIDTH - LEFT - RIGHT)

    label = f"{row.metric} over {len(points)} nights, now {number(row.value)}"
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    if row.reference is not None:
        if row.band:
            top, bottom = y(row.reference + row.band), y(row.reference - row.band)
            parts.append(_tag("rect", x=LEFT, y=top, width=WIDTH - LEFT - RIGHT, height=bottom - top, css="band"))
        level = y(row.reference)
        parts.append(_tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=level, y2=level, css="reference"))
    for value in (low + margin, high - margin):
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{escape(number(value))}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 4}">{escape(points[0][2])}</text>')
    if len(points) > 1:
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(points[-1][2])}</text>')
        line = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, (value, _, _) in enumerate(points))
        parts.append(f'<polyline points="{line}"/>')
    parts += _dots(points, [x(place) for place in range(len(points))], [y(value) for value, _, _ in points])
    return "".join([*parts, "</svg>"])


def _dots(points: Sequence[tuple[float, str, str]], xs: Sequence[float], ys: Sequence[float]) -> list[str]:
    return [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 if place == len(points) - 1 else 2.5}" class="{escape(verdict)}">'
        f"<title>{escape(f'{day}: {number(value)}, {verdict}')}</title></circle>"
        for place, ((value, verdict, day), x, y) in enumerate(zip(points, xs, ys, strict=True))
    ]


def _tag(name: str, css: str, **numbers: float) -> str:
    return f'<{name} class="{css}" ' + " ".join(f'{key}="{value:.1f}"' for key, value in numbers.items()) + "/>"
