"""What is particular to training on many tasks: which rows, which denominator, what a row sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_core.data.rows import DataError
from dora_core.testing.contracts import train_tiny
from dora_core.testing.ranks import RankError, run_on_ranks
from dora_core.training.checkpoint import CheckpointStore
from dora_core.training.metrics import read_metrics
from pipelines.video.extract import extract
from pipelines.video.features import load_encoder

EVERY = "[vqa, gqa, nlvr2, caption, tvqa, how2qa, tvc, yc2c]"


def settings(dataset: Path, **changes) -> dict:
    own = {
        "model.path": dataset / "model",
        "data.path": dataset,
        "data.visual.path": dataset,
        "data.visual.num_slots": 6,
        "data.num_validation": 4,
        "data.tasks": EVERY,
        "train.global_batch_size": 6,
        "train.micro_batch_size": 6,
        "train.max_steps": 12,
        "train.eval_every": 6,
        "train.save_every": 6,
        "adapter.rank": 2,
        "adapter.alpha": 2,
    }
    return own | {name.replace("__", "."): value for name, value in changes.items()}


def run(dataset: Path, folder: Path, name: str, world_size: int = 1, **changes) -> list[float]:
    chosen = settings(dataset, **changes)
    return run_on_ranks(train_tiny, world_size, "video", folder, name, chosen, timeout_s=240)[0]


def test_eight_tasks_train_in_one_model_with_the_same_losses_however_a_batch_is_split(dataset, tmp_path):
    """Weighed answers, means over rows and means over tokens: each step's denominator is that of all its rows."""
    whole = run(dataset, tmp_path, "whole")
    assert len(whole) == 12
    for world_size, micro, zero in ((1, 2, "zero2"), (2, 1, "zero3")):
        changes = {"train__micro_batch_size": micro, "deepspeed__config": zero}
        losses = run(dataset, tmp_path, f"{world_size}x{micro}", world_size, **changes)
        assert losses == pytest.approx(whole, abs=2e-5), (world_size, micro)
    rows = read_metrics(tmp_path / "runs" / "whole" / "metrics.jsonl")
    assert len({row["task"] for row in rows if "task" in row}) >= 5
    validation = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in validation] == [6, 12]
    own = [value for name, value in validation[0].items() if name.startswith("validation_loss_")]
    assert len(own) == 8 and validation[0]["validation_loss"] == pytest.approx(np.mean(own))


def test_answers_drawn_anew_in_each_epoch_are_the_same_after_a_restart(dataset, tmp_path):
    changes = {"data__tasks": "[vqa]", "train__max_steps": 10, "train__save_every": 5, "adapter__dropout": 0.1}
    whole = run(dataset, tmp_path, "whole", **changes)
    first = run(dataset, tmp_path, "parts", **{**changes, "train__max_steps": 5})
    both = run(dataset, tmp_path, "parts", **changes, run__resume="must")
    assert first == whole[:5] and both == whole
    stores = [CheckpointStore(tmp_path / "runs" / name / "checkpoints") for name in ("whole", "parts")]
    weights = [store.weights(10) for store in stores]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_other_features_are_other_data(dataset, tmp_path):
    changes = {"data__tasks": "[tvc]", "train__max_steps": 2, "train__save_every": 1, "data__num_validation": 0}
    run(dataset, tmp_path, "run", **changes)
    with pytest.raises(RankError, match=r"data"):
        run(
            dataset,
            tmp_path,
            "run",
            **{**changes, "train__max_steps": 3},
            data__visual__num_slots=5,
            run__resume="must",
        )


def copy_with(dataset: Path, folder: Path, broken: list[str]) -> Path:
    folder.mkdir()
    for name in ("model", "video"):
        (folder / name).symlink_to(dataset / name)
    (folder / "tv").mkdir()
    for file in (dataset / "tv").glob("*.npz"):
        (folder / "tv" / file.name).write_bytes(b"broken" if file.stem in broken else file.read_bytes())
    return folder


def test_rows_that_cannot_be_used_are_counted_and_too_many_end_a_run_with_what_it_learned(dataset, tmp_path):
    changes = {"data__tasks": "[tvqa]", "train__max_steps": 4, "data__num_validation": 0}
    few = copy_with(dataset, tmp_path / "few", ["train3"])
    run(few, tmp_path, "few", 2, **{**changes, "train__micro_batch_size": 3})
    noted = [json.loads(line) for line in (tmp_path / "runs/few/bad_rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in noted] == ["tvqa 3"] and "train3" in noted[0]["reason"]
    assert read_metrics(tmp_path / "runs/few/metrics.jsonl")[-1]["num_bad"] == 1
    many = copy_with(dataset, tmp_path / "many", [f"train{number}" for number in range(5, 15)])
    with pytest.raises(RankError, match=r"of \d+ rows read by step \d cannot be used"):
        run(many, tmp_path, "many", **changes)
    assert CheckpointStore(tmp_path / "runs/many/checkpoints").newest() is not None
    assert issubclass(DataError, ValueError)


def test_online_features_train_as_cached_ones_do(dataset, tmp_path):
    """The same losses to the bit on the CPU: what the encoder sees and how it rounds does not depend on the mode."""
    media = tmp_path / "images" / "nlvr"
    media.mkdir(parents=True)
    for seed, file in enumerate(sorted((dataset / "nlvr").glob("*.npz"))):
        noise = np.random.default_rng(seed).integers(0, 256, (9, 14, 3), np.uint8)
        Image.fromarray(noise).save(media / f"{file.stem}.png")
    extract(
        media, tmp_path / "cached" / "nlvr", load_encoder("pixels:12", "grid"), shard_size=20, say=lambda text: None
    )
    changes = {"data__tasks": "[nlvr2]", "train__max_steps": 4, "data__visual__num_slots": 36}
    cached = run(dataset, tmp_path, "cached", data__visual__path=tmp_path / "cached", **changes)
    online = {"data__visual__mode": "online", "data__visual__encoder": "pixels:12", "data__visual__kind": "grid"}
    found = run(dataset, tmp_path, "online", 1, data__visual__path=tmp_path, **online, **changes)
    assert found == cached
    parts = {**changes, "train__micro_batch_size": 3}
    split = run(dataset, tmp_path, "split", 2, data__visual__path=tmp_path, **online, **parts)
    assert split == pytest.approx(cached, abs=1e-5)


def test_layer_norms_and_biases_train_as_the_recipe_says(dataset, tmp_path):
    changes = {
        "train__max_steps": 2,
        "adapter__trainable": "[visual_embedding, self_attn_layer_norm, final_layer_norm]",
        "train__weight_decay": 0.01,
    }
    run(dataset, tmp_path, "norms", **changes)
    names = set(CheckpointStore(tmp_path / "runs/norms/checkpoints").weights(2))
    assert "model.decoder.layers.1.final_layer_norm.weight" in names
    assert "model.encoder.layers.0.fc1.bias" in names and "model.encoder.layers.0.fc1.weight" not in names
    run(dataset, tmp_path, "bare", **{**changes, "adapter__bias": "none", "adapter__trainable": "[visual_embedding]"})
    names = set(CheckpointStore(tmp_path / "runs/bare/checkpoints").weights(2))
    assert not any(name.endswith("fc1.bias") or "layer_norm" in name for name in names)
