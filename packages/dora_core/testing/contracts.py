"""What every pipeline must do, run on its recipe ``tiny`` in a folder that its ``prepare`` filled."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from dora_core.adapters.stored import BASE_BIAS, PREFIX, SUFFIXES, WEIGHTS_FILE
from dora_core.config import load_config
from dora_core.engine.distributed import World
from dora_core.registry import PIPELINES, pipeline_packages
from dora_core.training.checkpoint import CheckpointStore
from dora_core.training.metrics import read_metrics


def train_tiny(world: World, pipeline: str, folder: str | Path, name: str, overrides: dict[str, Any]) -> list[float]:
    """Train the recipe ``tiny`` in ``folder`` as run ``name`` and return the logged losses. Every rank calls it."""
    os.chdir(folder)
    entry = PIPELINES.get(pipeline)
    settings = {"run.name": name, "log.progress": "false", "log.tensorboard": "false", "train.log_every": 1} | overrides
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    config = load_config(entry.config, "tiny", words, recipes=entry.recipes)
    importlib.import_module(f"{pipeline_packages()[pipeline]}.train").train(config)
    world.barrier()
    return [row["loss"] for row in read_metrics(Path("runs") / name / "metrics.jsonl") if "loss" in row]


def exported_is_trained(run_folder: Path) -> bool:
    """Whether the exported adapter holds exactly the weights of the checkpoint it was made from."""
    store = CheckpointStore(run_folder / "checkpoints")
    exported = load_file(run_folder / "adapter" / WEIGHTS_FILE)

    def same(weights: dict[str, Any]) -> bool:
        adapter = {}
        for name, value in weights.items():
            module, _, key = name.rpartition(".")
            is_base_bias = key == "bias" and f"{module}.lora_A" in weights
            adapter[PREFIX + module + (BASE_BIAS if is_base_bias else SUFFIXES.get(key, f".{key}"))] = value
        return adapter.keys() == exported.keys() and all(
            (exported[key] == value).all() for key, value in adapter.items()
        )

    return any(same(store.weights(step)) for step in store.steps())
