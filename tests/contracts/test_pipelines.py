"""Every pipeline that the registry finds keeps the same promises, on its recipe ``tiny``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dora_core.registry import PIPELINES
from dora_core.testing.contracts import exported_is_trained, train_tiny
from dora_core.testing.ranks import run_on_ranks
from dora_core.training.checkpoint import CheckpointStore

NAMES = PIPELINES.names()
SHORT = {"train.max_steps": 4, "train.eval_every": 4, "train.save_every": 2, "train.schedule": "constant"}
RELEASE_ALWAYS = (
    "{stage3_param_persistence_threshold: 0, stage3_max_live_parameters: 0, stage3_max_reuse_distance: 0, "
    "stage3_prefetch_bucket_size: 0}"
)


def test_there_are_pipelines():
    assert {"llm", "video", "vlm"} <= set(NAMES)


@pytest.fixture(scope="session", params=NAMES)
def pipeline(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    PIPELINES.get(request.param).prepare([str(folder / "data" / "world")])
    return request.param, folder


def train(pipeline, world_size: int, run: str, **overrides) -> list[float]:
    name, folder = pipeline
    return run_on_ranks(train_tiny, world_size, name, folder, run, {**SHORT, **overrides}, timeout_s=240)[0]


def test_the_tiny_recipe_learns_and_leaves_a_whole_run_folder(pipeline):
    losses = train(pipeline, 2, "learns", **{"train.max_steps": 40, "train.eval_every": 20})
    assert len(losses) == 40
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]
    folder = pipeline[1] / "runs" / "learns"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "loss.png"):
        assert (folder / name).stat().st_size > 0
    assert CheckpointStore(folder / "checkpoints").newest() == 40
    assert exported_is_trained(folder)


@pytest.mark.parametrize("world_size", [1, 2])
def test_stop_and_resume_is_the_run_that_did_not_stop(pipeline, world_size):
    dropout = {"adapter.dropout": 0.1, "train.micro_batch_size": 8 // world_size}
    whole = train(pipeline, world_size, f"whole{world_size}", **dropout)
    first = train(pipeline, world_size, f"parts{world_size}", **dropout, **{"train.max_steps": 2})
    both = train(pipeline, world_size, f"parts{world_size}", **dropout, **{"run.resume": "must"})
    assert first == whole[:2]
    assert both == whole
    folder: Path = pipeline[1] / "runs"
    stores = [CheckpointStore(folder / f"{name}{world_size}" / "checkpoints") for name in ("whole", "parts")]
    weights = [store.weights(4) for store in stores]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])
    moments = [load_file(store.path(4) / "optimizer.safetensors") for store in stores]
    assert all((moments[0][key] == moments[1][key]).all() for key in moments[0])


def test_however_a_batch_is_split_the_losses_are_the_same(pipeline):
    expected = train(pipeline, 1, "1x16", **{"train.micro_batch_size": 16})
    for world_size, micro in ((1, 4), (2, 4), (2, 8)):
        run = f"{world_size}x{micro}"
        losses = train(pipeline, world_size, run, **{"train.micro_batch_size": micro})
        assert losses == pytest.approx(expected, abs=1e-5), run


def test_every_zero_stage_has_the_same_losses(pipeline):
    expected = train(pipeline, 2, "zero0", **{"deepspeed.config": "zero0"})
    for stage in ("zero1", "zero2", "zero3", "zero3_offload"):
        extra = {"deepspeed.extra": RELEASE_ALWAYS} if stage.startswith("zero3") else {}
        assert train(pipeline, 2, stage, **{"deepspeed.config": stage}, **extra) == pytest.approx(expected, abs=1e-5), (
            stage
        )


def test_activation_checkpointing_does_not_change_the_losses(pipeline):
    expected = train(pipeline, 1, "kept")
    assert train(pipeline, 1, "recomputed", **{"train.gradient_checkpointing": "true"}) == pytest.approx(
        expected, abs=1e-6
    )


def test_the_best_checkpoint_is_kept_and_exported_when_the_last_is_worse(pipeline):
    too_fast = {
        "train.lr": 3.0,
        "train.max_steps": 3,
        "train.eval_every": 1,
        "train.save_every": 3,
        "train.keep_last": 1,
    }
    train(pipeline, 1, "worse", **too_fast)
    folder = pipeline[1] / "runs" / "worse"
    store = CheckpointStore(folder / "checkpoints")
    progress = json.loads((store.path(3) / "state.json").read_text())["progress"]
    assert progress["best_step"] < 3
    assert store.steps() == [progress["best_step"], 3]
    exported = load_file(folder / "adapter" / "adapter_model.safetensors")
    magnitudes = {
        name: value for name, value in store.weights(progress["best_step"]).items() if name.endswith("magnitude")
    }
    assert magnitudes
    for name, value in magnitudes.items():
        key = "base_model.model." + name.replace(".magnitude", ".lora_magnitude_vector")
        assert (exported[key] == value).all()
