"""What makes two runs with the same seed alike."""

from __future__ import annotations

import os
import random

import numpy
import torch


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed torch, Python and numpy; ``deterministic`` asks torch for deterministic algorithms."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
