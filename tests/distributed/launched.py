"""Starting the tiny run of the LLM pipeline under the ``deepspeed`` command, and looking at its processes.

Two ranks: on GPUs, with NCCL, where there are two, else on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from dora_core.engine.distributed import free_port

ROOT = Path(__file__).resolve().parents[2]


def command(*overrides: str) -> list[str]:
    deepspeed = Path(sys.executable).with_name("deepspeed")
    script = ROOT / "pipelines" / "llm" / "train.py"
    return [
        str(deepspeed),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        str(script),
        "--config",
        "tiny",
        *overrides,
    ]


def environment() -> dict[str, str]:
    # No PYTHONPATH: the script finds its checkout by itself, from any directory.
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return kept if torch.cuda.device_count() > 1 else {**kept, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def start(folder: Path, overrides: list[str]) -> subprocess.Popen:
    """Start the run in ``folder``; what it prints goes to the file ``log`` there."""
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command(*overrides), cwd=folder, stdout=log, stderr=log, env=environment())


def finish(folder: Path, overrides: list[str]) -> str:
    """Run to the end and return what was printed."""
    done = subprocess.run(
        command(*overrides), cwd=folder, env=environment(), capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def processes_of(run: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if run in words:
            found.append(int(folder.name))
    return found


def wait_until(condition, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False
