"""Draw the rows of ``step_time.py``: by regime, how much longer a step takes than that of the frozen model alone."""

from __future__ import annotations

import json
from pathlib import Path

COLOURS = {
    "peft-lora": "#b8b8b8",
    "peft-dora": "#6e6e6e",
    "ours-lora": "#8ecae6",
    "ours-dora": "#1d6fb8",
    "ours-dora-kept": "#0b3c5d",
    "ours-dora-offloaded": "#00798c",
    "ours-dora-fp32": "#2a9d8f",
    "ours-dora-plain": "#e9c46a",
    "ours-dora-dropout": "#9b5de5",
}


def plot(path: Path) -> Path:
    """Draw the summary in the JSON file ``path`` into a PNG beside it and return the PNG's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    content = json.loads(path.read_text(encoding="utf-8"))
    ratios = {
        (row["regime"], row["variant"]): row["ratio_to_floor"]
        for row in content["summary"]
        if not row["variant"].startswith("floor") and row["ratio_to_floor"] is not None
    }
    regimes = list(dict.fromkeys(regime for regime, _ in ratios))
    variants = list(dict.fromkeys(variant for _, variant in ratios))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 3.0 * len(regimes)), 5.0), layout="constrained")
    width = 0.84 / max(1, len(variants))
    for place, variant in enumerate(variants):
        shown = [
            (group, ratios[regime, variant]) for group, regime in enumerate(regimes) if (regime, variant) in ratios
        ]
        positions = [group + (place - (len(variants) - 1) / 2) * width for group, _ in shown]
        bars = axes.bar(
            positions,
            [ratio - 1 for _, ratio in shown],
            0.92 * width,
            bottom=1,
            color=COLOURS.get(variant, "#444444"),
            label=variant,
        )
        axes.bar_label(bars, [f"{ratio:.2f}" for _, ratio in shown], padding=2, fontsize=8, rotation=90)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(regimes)), regimes)
    axes.margins(y=0.12)
    axes.set_ylabel("step time / that of the frozen model alone")
    facts = content["environment"]
    axes.set_title(f"{facts['hardware']}, torch {facts['torch']}, PEFT {facts['peft']}", fontsize=10)
    axes.legend(ncols=max(1, min(4, len(variants))), fontsize=8, loc="upper left")
    axes.set_ylim(top=1 + 1.3 * (axes.get_ylim()[1] - 1))
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=150)
    pyplot.close(figure)
    return target
