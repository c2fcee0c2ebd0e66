"""What a run depended on beside its configuration: code, machine and library versions."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dora_core.evaluation.results import commit_hash

_PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "liger-kernel",
    "tokenizers",
    "safetensors",
    "datasets",
    "numpy",
    "dora-finetuning",
)


def describe_environment(world_size: int) -> dict[str, Any]:
    """Return command, commit, machine and versions as plain data."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "command": shlex.join(sys.argv),
        "commit": commit_hash(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware": torch.cuda.get_device_name() if cuda else processor_name(),
        "num_cpus": os.cpu_count(),
        "world_size": world_size,
        "versions": versions,
    }


def processor_name() -> str:
    """Return the processor's model where the system tells it, else its kind."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine()
