from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for fused_cases.py

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cpu" and tuple(map(int, version("triton").split(".")[:2])) < (3, 8):
        for item in items:
            if "adapters/kernels" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="Triton's interpreter before 3.8 does not fit today's numpy"))


@pytest.fixture
def device() -> str:
    """Where kernels can run: a GPU, or the CPU with Triton's interpreter."""
    return DEVICE
