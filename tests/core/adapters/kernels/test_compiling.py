"""The kernels compile for a GPU and fit into it, wherever the tests run: the interpreter accepts more than those do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dora_core.adapters.kernels import gradient_kernels, token_kernels, weight_kernels
from dora_core.adapters.kernels.dispatch import SHARED_KIB


def test_every_kernel_compiles_for_a_gpu_and_fits_into_it(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py")],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    modules = (gradient_kernels, token_kernels, weight_kernels)
    found = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in found} == {
        name for module in modules for name in vars(module) if name.endswith("_kernel")
    }
    assert not [(name, shared) for name, shared in found if int(shared) > SHARED_KIB * 1024]
