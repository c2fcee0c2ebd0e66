from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `cases`, here and in the ranks


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    from cases import write_model

    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder
