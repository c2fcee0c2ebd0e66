"""The report in a real browser without a screen: it shows something, at a desk, on a phone and in the dark."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from PIL import Image

from dora_core.nightly.judge import judge_night
from dora_core.nightly.page import html_page

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
RED = (198, 40, 47)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
@pytest.mark.parametrize(("width", "height", "dark"), [(1100, 900, False), (500, 900, False), (1100, 900, True)])
def test_the_report_is_drawn(history, planned, measured, measurement, tmp_path, width, height, dark):
    for night in range(1, 8):
        outcomes = [1] * 40 if night < 7 else [0] * 15 + [1] * 25
        run = measured(
            measurement(outcomes=outcomes),
            measurement(100.0 + night % 3, metric="tokens_per_s", stderr=1.0, data="x", evaluation=""),
        )
        name = f"2026-01-{night:02d}"
        history.add_run(name, f"{name}T03:00:00", "toy", "tiny", run)
        rows = judge_night(history, name, [planned()], {"toy/tiny": run}, {})
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(html_page(rows, "2026-01-07"), encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}/b",
    ]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command += [f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        image = image.convert("RGB")
        assert image.size == (width, height)
        colors = dict((color, count) for count, color in image.getcolors(width * height))
    background = max(colors, key=colors.get)
    assert (max(background) < 80) == dark
    assert len(colors) > 50 and colors[background] < 0.95 * width * height
    if not dark:
        assert colors.get(RED, 0) > 200  # the badge and the edge of the red row
