"""A stand-in for a launched training script."""

import sys

import pytest

CHAIN = """
import pathlib, signal, subprocess, sys, time

depth, folder, save_s = int(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[3])
if depth:  # the launcher, and its child that starts the rank
    sys.exit(subprocess.call([sys.executable, __file__, str(depth - 1), *sys.argv[2:]]))

def save(*_):
    time.sleep(save_s)
    (folder / "saved").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
(folder / "ready").touch()
print("5%|#   | 1/20 [00:01]", file=sys.stderr, flush=True)
time.sleep(600)
"""


@pytest.fixture
def chain(tmp_path):
    """A command of three processes in a row, as the launcher's, whose last saves when it is told to stop."""
    script = tmp_path / "chain.py"
    script.write_text(CHAIN)
    return lambda save_s, folder=tmp_path: [sys.executable, str(script), "2", str(folder), str(save_s)]
