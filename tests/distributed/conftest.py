from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `cases` and `launched`, here and in the ranks


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    from cases import write_model

    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A folder with the LLM pipeline's small world, to run in."""
    from dora_core.registry import PIPELINES

    PIPELINES.get("llm").prepare([str(tmp_path / "data" / "world")])
    return tmp_path
