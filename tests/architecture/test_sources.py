from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for name in ("packages", "pipelines") for path in (ROOT / name).rglob("*.py"))
LOOPS = sorted((ROOT / "pipelines").glob("*/train.py"))

MAX_LINES = 250
MAX_LOOP_LINES = 200
NUM_SHARED_LINES = 25

TRACES = ("/work/", "/root/", "/home/", "helper-", "sandbox", "pypi.org/simple")
"""Words that only the machine or the occasion on which a file was written would put there."""
BROWSER_OPTION = "--no-sandbox"
"""What chromium needs to run as root, as in containers."""
TEXT_SUFFIXES = {"", ".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".cfg", ".sh"}
NOT_OURS = {"runs", "build", "dist", "node_modules"}


def texts(root: Path) -> Iterator[Path]:
    """Yield the repository's own text files: no hidden folders but .ci and .github, no data at rest, nothing built."""
    for path in sorted(root.iterdir()):
        if path.is_dir():
            hidden = path.name.startswith((".", "__")) and path.name not in (".ci", ".github")
            if not hidden and path.name not in NOT_OURS and not path.name.endswith(".egg-info"):
                yield from texts(path) if path != ROOT / "data" else path.glob("[!.]*.*")
        elif path.suffix in TEXT_SUFFIXES and path.name != ".git":
            yield path


INHERITED = {"forward", "extra_repr"}
"""Methods that torch documents."""


def undocumented(path: Path) -> list[str]:
    """Return what is public and has no docstring; overriding a documented method is enough."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = ["the module"] if tree.body and not ast.get_docstring(tree) else []
    documented = set(INHERITED)
    for parent in ast.walk(tree):
        if not isinstance(parent, ast.Module | ast.ClassDef) or getattr(parent, "name", "").startswith("_"):
            continue
        for node in parent.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
                continue
            if ast.get_docstring(node):
                documented.add(node.name)
            elif not (isinstance(parent, ast.ClassDef) and node.name in documented):
                found.append(node.name)
    return found


def shared_run(first: list[str], second: list[str]) -> int:
    """Return the length of the longest run of lines that both have."""
    best = 0
    ends: dict[int, int] = {}
    for line in first:
        ends = {j: ends.get(j - 1, 0) + 1 for j, other in enumerate(second) if line == other}
        best = max(best, *ends.values(), 0) if ends else best
    return best


def test_there_are_sources_and_training_loops_to_check():
    assert len(SOURCES) > 30 and LOOPS


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short_and_its_public_parts_are_documented(path):
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES, f"{num_lines} lines; {MAX_LINES} at most"
    assert not undocumented(path)


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.parent.name)
def test_a_training_script_fits_in_a_few_screens(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LOOP_LINES


def test_two_training_scripts_share_verbs_and_not_sentences():
    scripts = {
        path.parent.name: [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for path in LOOPS
    }
    for first, second in itertools.combinations(scripts, 2):
        num = shared_run(scripts[first], scripts[second])
        assert num < NUM_SHARED_LINES, f"{first} and {second} share {num} lines in a row"


def test_the_longest_shared_run_is_found():
    assert shared_run(list("abcdef"), list("xbcdyef")) == 3
    assert shared_run(list("abc"), list("xyz")) == 0
    assert shared_run(list("aaa"), list("aa")) == 2
    assert shared_run([], []) == 0


def test_no_file_tells_of_the_machine_it_was_written_on():
    files = [path for path in texts(ROOT) if path != Path(__file__)]
    assert {ROOT / "pyproject.toml", ROOT / "packages" / "dora_core" / "cli.py"} <= set(files)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word in TRACES
        if word in line.lower().replace(BROWSER_OPTION, "")
    ]
    assert not found, "\n".join(found)
