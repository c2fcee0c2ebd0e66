"""``report.html``: one file that needs no network, worst first, readable on a phone and in the dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dora_core.nightly.rows import ORDER, Flip, Row
from dora_core.nightly.texts import CONTROL, number, summary, value_text
from dora_core.nightly.trend import trend_plot

MAX_FLIPS = 30

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5c636b; --paper: #f4f5f7; --card: #fff; --line: #d9dde2;
  --red: #c6282f; --yellow: #a66b00; --green: #1c7c3c; --grey: #737a82; --blue: #2b62c4; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #a0a7af; --paper: #15171a; --card: #1e2125;
  --line: #343a41; --red: #ff6b6b; --yellow: #f0b429; --green: #4cc574; --grey: #98a0a8; --blue: #7aa7ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1080px; background: var(--paper); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: 0 0 4px; } h2 { font-size: 1rem; margin: 0; } p { margin: 4px 0; }
.soft { color: var(--soft); font-size: .86rem; }
.counts { display: flex; flex-wrap: wrap; gap: 8px; margin: 12px 0; }
.badge { display: inline-block; padding: 1px 9px; border-radius: 99px; color: var(--card);
  font-weight: 600; font-size: .82rem; }
.badge.broken, .badge.red { background: var(--red); } .badge.yellow { background: var(--yellow); }
.badge.green { background: var(--green); } .badge.grey { background: var(--grey); }
article { display: grid; grid-template-columns: minmax(0, 1fr) 320px; gap: 4px 16px; margin: 10px 0; padding: 12px 14px;
  background: var(--card); border: 1px solid var(--line); border-left: 5px solid var(--grey); border-radius: 8px; }
article.broken, article.red { border-left-color: var(--red); } article.yellow { border-left-color: var(--yellow); }
article.green { border-left-color: var(--green); } article > details { grid-column: 1 / -1; }
.value { font-size: 1.15rem; font-variant-numeric: tabular-nums; }
@media (max-width: 720px) { article { grid-template-columns: minmax(0, 1fr); } body { padding: 10px; } }
pre { margin: 6px 0; padding: 8px; background: var(--paper); border-radius: 6px; white-space: pre-wrap;
  font-size: .82rem; }
summary { cursor: pointer; color: var(--blue); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .84rem; width: 100%; min-width: 480px; }
th, td { text-align: left; overflow-wrap: break-word; max-width: 26em; vertical-align: top;
  padding: 4px 8px; border-top: 1px solid var(--line); }
svg { width: 100%; max-width: 320px; height: auto; } svg text { font: 10px system-ui, sans-serif; fill: var(--soft); }
svg polyline { fill: none; stroke: var(--blue); stroke-width: 1.5; } svg .band { fill: var(--blue); opacity: .12; }
svg .reference { stroke: var(--soft); stroke-dasharray: 4 3; } svg circle { fill: var(--grey); }
svg circle.red { fill: var(--red); } svg circle.yellow { fill: var(--yellow); } svg circle.green { fill: var(--green); }
"""


def html_page(rows: Sequence[Row], night: str) -> str:
    """Return the page; every text of the run is escaped, and there is no script, link or picture in it."""
    counts = "".join(
        f'<span class="badge {verdict}">{sum(row.verdict == verdict for row in rows)} {verdict}</span>'
        for verdict in ORDER
        if any(row.verdict == verdict for row in rows)
    )
    worst = rows[0].verdict if rows else "grey"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(worst)}: dora nightly {escape(night)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>dora nightly {escape(night)}</h1>\n<p>{escape(summary(rows))}, worst first.</p>\n"
        f'<div class="counts">{counts}</div>\n'
        + "\n".join(_article(row) for row in rows)
        + f'\n<p class="soft">{escape(CONTROL)}</p>\n</body>\n</html>\n'
    )


def _article(row: Row) -> str:
    reference = f"reference {number(row.reference)}, " if row.reference is not None else ""
    band = f"± {number(row.band)}, " if row.band else ""
    examples = f", {row.n:,} values" if row.n and row.n > 1 else ""
    title = f"{row.planned.name}: {row.metric}"
    parts = [
        f'<article class="{row.verdict}"><div>',
        f'<h2><span class="badge {row.verdict}">{row.verdict}</span> {escape(title)}</h2>',
        f'<p class="value">{escape(value_text(row))} <span class="soft">{escape(row.unit)}{examples}</span></p>'
        if row.value is not None
        else "",
        f"<p>{escape(reference + band + row.reason)}</p>",
        "".join(f'<p class="soft">changed: {escape(note)}</p>' for note in row.notes),
        f"</div><div>{trend_plot(row)}</div>",
        _flips(row.flips) if row.flips else "",
        f"<details><summary>reproduce</summary><pre>{escape(row.planned.reproduce())}</pre>{_origin(row)}</details>",
        "</article>",
    ]
    return "".join(parts)


def _origin(row: Row) -> str:
    own = row.measured
    if own is None:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in own.versions.items())
    text = f"commit {own.commit}; {own.hardware}; {versions}; config {own.config_hash[:12]}; data {row.data_hash}"
    return f'<p class="soft">{escape(text)}</p>'


def _flips(flips: Sequence[Flip]) -> str:
    num_worse = sum(flip.worse for flip in flips)
    left_out = f" The first {MAX_FLIPS} are shown." if len(flips) > MAX_FLIPS else ""
    lines = "".join(
        f"<tr><td>{flip.index}</td><td>{'worse' if flip.worse else 'better'}</td><td>{escape(flip.now.question)}</td>"
        f"<td>{escape(flip.now.right)}</td><td>{escape(flip.before.given)} ({number(flip.before.value)})</td>"
        f"<td>{escape(flip.now.given)} ({number(flip.now.value)})</td></tr>"
        for flip in flips[:MAX_FLIPS]
    )
    return (
        f"<details><summary>{len(flips)} examples flipped: {num_worse} worse, {len(flips) - num_worse} better</summary>"
        f'<div class="scroll"><table><tr><th>row</th><th>change</th><th>question</th><th>right</th><th>before</th>'
        f"<th>now</th></tr>{lines}</table></div>{left_out}</details>"
    )
