"""The tutorial in pipelines/README.md works as it is written, in a checkout and as an installed distribution."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dora_core.engine.distributed import free_port
from dora_core.evaluation.results import Metric, read_results

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "pipelines" / "README.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^\*\*`([^`\n]+)`\*\*\n\n```\w+\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
"""A code block under a bold path is that file."""
IN_CHECKOUT, INSTALLED = (
    text.strip().splitlines() for text in re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
)
MAX_LINES = 300
COMMANDS = """
import shlex, sys
from dora_core.cli import main
for line in sys.stdin.read().splitlines():
    print("$", line, flush=True)
    main(shlex.split(line)[1:])
"""
"""Lines of ``dora ...`` in one process, which imports torch once."""


def write_package(folder: Path) -> None:
    for name, text in FILES.items():
        if name.startswith("audio/"):
            path = folder / name.removeprefix("audio/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def run(words: list[str], cwd: Path, path: list[Path], text: str | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(words, cwd=cwd, env=environment, input=text, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def dora(lines: list[str], cwd: Path, path: list[Path]) -> str:
    assert lines and all(line.startswith("dora ") for line in lines)
    return run([sys.executable, "-c", COMMANDS], cwd, path, "\n".join(lines))


def deepspeed(line: str, cwd: Path, path: list[Path]) -> None:
    program, *words = shlex.split(line)
    port = ["--master_port", str(free_port())]  # others may be running
    run([str(Path(sys.executable).with_name(program)), *port, *words], cwd, path)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout with the tutorial's files in it and nothing else changed."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("packages", "pipelines", "deepspeed_configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_package(folder / "pipelines" / "audio")
    return folder


@pytest.fixture(scope="module")
def finished(checkout) -> Path:
    """The checkout after the tutorial's commands but the last, which is a test of its own."""
    path = [checkout / "packages", checkout]
    [place] = [place for place, line in enumerate(IN_CHECKOUT) if line.startswith("deepspeed")]
    told = dora(IN_CHECKOUT[:place], checkout, path)
    assert f"audio  ({checkout / 'pipelines' / 'audio'})\n  recipes     tiny\n" in told
    assert "evaluators  audio/count, audio/higher, audio/longer, audio/louder\n" in told
    deepspeed(IN_CHECKOUT[place], checkout, [])  # the script finds its checkout by itself
    dora(IN_CHECKOUT[place + 1 : -1], checkout, path)
    return checkout


def test_the_files_are_complete_and_short():
    for name in ("pipeline", "config", "train", "evaluators", "prepare"):
        assert f"audio/{name}.py" in FILES
    lines = [line for name, text in FILES.items() if name.startswith("audio/") for line in text.splitlines()]
    num_lines = sum(bool(line.strip()) for line in lines)
    assert num_lines < MAX_LINES
    assert f"together {num_lines} lines" in TEXT


def test_the_files_keep_the_rules_of_this_repository(checkout):
    ruff = Path(sys.executable).with_name("ruff")
    if ruff.is_file():
        run([str(ruff), "check", "--no-cache", "pipelines/audio"], checkout, [])
        run([str(ruff), "format", "--no-cache", "--check", "pipelines/audio"], checkout, [])
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/architecture", "-k"]
    words.append("audio or share_verbs or who_may_import")
    told = run(words, checkout, [checkout / "packages", checkout])
    assert re.search(r"\d\d passed", told) and "failed" not in told


def test_the_model_listens(finished):
    def average(folder: str) -> Metric:
        return {metric.name: metric for metric in read_results(finished / folder)}["audio/average"]

    own, other, merged = map(average, ("results", "results/other", "results/merged"))
    assert own.value > 0.7 > 0.6 > own.extra["majority"]
    assert abs(other.value - other.extra["majority"]) < 0.1
    assert merged.value == pytest.approx(own.value, abs=0.01)  # one answer in a hundred may be a tie
    assert own.config_hash != other.config_hash


def test_the_pipeline_keeps_the_contract(checkout):
    program, *words = shlex.split(IN_CHECKOUT[-1])
    told = run([sys.executable, "-m", program, *words], checkout, [checkout / "packages", checkout])
    assert re.search(r"^\d+ passed, \d+ deselected", told, re.MULTILINE), told


def test_an_installed_distribution_is_found_by_its_entry_point(finished, tmp_path):
    project, site = tmp_path / "project", tmp_path / "site"
    write_package(project / "dora_audio")
    (project / "pyproject.toml").write_text(FILES["pyproject.toml"], encoding="utf-8")
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", str(site)]
    install, *lines, launch = INSTALLED
    run([sys.executable, "-m", *shlex.split(install), *offline], project, [])
    path = [site, ROOT / "packages", ROOT]
    (tmp_path / "data").symlink_to(finished / "data")
    short = " --train.max_steps 4"
    [place] = [place for place, line in enumerate(lines) if line.startswith("dora train")]
    lines[place] += short
    told = dora(lines, tmp_path, path)
    assert f"audio  ({site / 'dora_audio'})\n  recipes     tiny\n" in told
    deepspeed(launch + short, tmp_path, path)
    for name in ("installed", "launched"):
        assert (tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors").is_file()
    assert "audio/average" in {metric.name for metric in read_results(tmp_path / "results" / "installed")}
    assert "audio/tiny: finished" in told and (tmp_path / "runs" / "installed_night" / "report.html").is_file()
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/contracts", "-k", "audio"]
    assert re.search(r"^\d+ passed, \d+ deselected", run(words, ROOT, path), re.MULTILINE)
