"""The same texts for every batch size, number of ranks and ZeRO stage, from a run and from the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dora_core.adapters import apply_adapters, save_adapter
from dora_core.cli import main as dora
from dora_core.evaluation.results import read_results
from dora_core.testing.contracts import train_tiny
from dora_core.testing.ranks import run_on_ranks
from pipelines.video.config import ModelSection, VideoAdapterSection
from pipelines.video.extract import extract
from pipelines.video.features import load_encoder
from pipelines.video.model import load_tokenizer, load_vl_bart

TASKS = ["vqa", "gqa", "nlvr2", "coco_caption", "tvqa", "how2qa", "tvc", "yc2c"]


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def texts(folder: Path) -> list[str]:
    return [row["text"] for row in predictions(folder)]


def words(dataset: Path, *more: str) -> list[str]:
    """Return the settings of the command, on the tasks of the data set ``dataset``."""
    return [
        *("--config", "tiny", "--model.path", str(dataset / "model"), "--data.path", str(dataset)),
        *("--data.visual.num_slots", "6", "--data.visual.path", str(dataset), "--evaluate.num_beams", "3"),
        *("--evaluate.max_new_tokens", "8", *more),
    ]


def scored(dataset: Path, folder: Path, *more: str) -> list[str]:
    dora(["evaluate", "video", *words(dataset, *more), "--output", str(folder)])
    return texts(folder)


@pytest.fixture(scope="module")
def expected(dataset, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("alone")
    return scored(dataset, folder, "--evaluate.tasks", f"[{', '.join(TASKS)}]", "--evaluate.batch_size", "1")


@pytest.mark.parametrize("batch_size", [4, 16])
def test_texts_do_not_depend_on_the_batch_size(dataset, tmp_path, expected, batch_size):
    found = scored(
        dataset, tmp_path, "--evaluate.tasks", f"[{', '.join(TASKS)}]", "--evaluate.batch_size", str(batch_size)
    )
    assert found == expected
    assert len(found) == 48 and len(set(found)) > 8
    assert [metric.name for metric in read_results(tmp_path)][-1] == "video/average"


def run_settings(dataset: Path) -> dict:
    return {
        "model.path": dataset / "model",
        "data.path": dataset,
        "data.visual.path": dataset,
        "data.visual.num_slots": 6,
        "data.num_validation": 0,
        "data.tasks": "[tvqa, nlvr2]",
        "train.global_batch_size": 2,
        "train.micro_batch_size": 1,
        "train.max_steps": 1,
        "train.eval_every": "null",
        "train.save_every": "null",
        "evaluate.before_training": "true",
        "evaluate.tasks": f"[{', '.join(TASKS)}]",
        "evaluate.num_beams": 3,
        "evaluate.batch_size": 4,
        "evaluate.max_new_tokens": 8,
        "adapter.rank": 2,
        "adapter.alpha": 2,
    }


@pytest.mark.parametrize(("world_size", "zero"), [(1, "zero0"), (2, "zero2"), (2, "zero3")])
def test_texts_before_training_are_those_of_the_model_on_any_ranks(dataset, tmp_path, expected, world_size, zero):
    """The run trains on pictures that only some of the scored tasks show: the others are opened for scoring."""
    settings = {**run_settings(dataset), "deepspeed.config": zero}
    run_on_ranks(train_tiny, world_size, "video", tmp_path, "scored", settings, timeout_s=120)
    folder = tmp_path / "runs" / "scored" / "results" / "before"
    assert texts(folder) == expected
    assert (folder / "accuracy.png").stat().st_size > 0
    assert (folder / "submissions" / "tvqa_test_public_predictions.json").exists() or (
        folder / "submissions" / "tvqa_test_predictions.json"
    ).exists()


def test_a_run_in_half_precision_is_scored_and_its_adapter_too(dataset, tmp_path, monkeypatch):
    settings = {**run_settings(dataset), "train.precision": "bf16", "evaluate.after_training": "true"}
    run_on_ranks(train_tiny, 1, "video", tmp_path, "half", settings, timeout_s=120)
    folder = tmp_path / "runs" / "half"
    more = ("--train.precision", "bf16", "--adapter", str(folder / "adapter"), "--evaluate.batch_size", "4")
    found = scored(dataset, tmp_path / "again", "--evaluate.tasks", f"[{', '.join(TASKS)}]", *more)
    assert found == texts(folder / "results" / "after")


def test_the_command_scores_a_model_with_its_adapter(dataset, tmp_path, expected):
    section = ModelSection(path=str(dataset / "model"))
    model = load_vl_bart(section, load_tokenizer(section), 12, "fp32")
    config = VideoAdapterSection(rank=2, alpha=2)
    apply_adapters(model, config)
    with torch.no_grad():
        model.model.encoder.visual_embedding.feature[0].weight.mul_(-3)
    save_adapter(model, config, tmp_path / "adapter", str(dataset / "model"))
    more = ("--evaluate.tasks", f"[{', '.join(TASKS)}]", "--adapter", str(tmp_path / "adapter"))
    assert scored(dataset, tmp_path / "adapted", *more) != expected


def test_shuffled_rows_see_what_others_should_and_one_frame_is_the_middle_one(dataset, tmp_path):
    only = ("--evaluate.tasks", "[tvqa]")
    own = scored(dataset, tmp_path / "own", *only)
    shuffled = scored(dataset, tmp_path / "shuffled", *only, "--evaluate.look", "shuffled")
    seen = [[row["visuals"] for row in predictions(tmp_path / name)] for name in ("own", "shuffled")]
    assert seen[1] == seen[0][3:] + seen[0][:3] and len(own) == len(shuffled) == 6
    frozen = tmp_path / "frozen"
    for folder in (dataset / "tv", dataset / "model", dataset / "video"):
        (frozen / folder.name).parent.mkdir(exist_ok=True)
        (frozen / folder.name).symlink_to(folder) if folder.name != "tv" else (frozen / "tv").mkdir()
    for file in (dataset / "tv").glob("*.npz"):
        features = np.load(file)["features"]
        middle = features[len(features) // 2]
        np.savez(frozen / "tv" / file.name, features=np.repeat(middle[None], len(features), 0))
    one_frame = scored(dataset, tmp_path / "one", *only, "--evaluate.look", "one_frame")
    assert one_frame == scored(frozen, tmp_path / "same", *only)
    hashes = {read_results(tmp_path / name)[0].config_hash for name in ("own", "shuffled", "one")}
    assert len(hashes) == 3


def test_features_that_cannot_be_read_end_the_scoring(dataset, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("tv", "model", "video"):
        (broken / name).symlink_to(dataset / name) if name != "tv" else (broken / "tv").mkdir()
    for file in (dataset / "tv").glob("*.npz"):
        (broken / "tv" / file.name).write_bytes(file.read_bytes() if file.stem != "test3" else b"no features")
    with pytest.raises(SystemExit) as stopped:
        scored(broken, tmp_path / "out", "--evaluate.tasks", "[tvqa]")
    assert stopped.value.code == 2
    assert "test3" in capsys.readouterr().err


def test_an_unknown_task_and_none_at_all_are_errors(dataset, tmp_path, capsys):
    for tasks, message in (("[]", "it must name at least one benchmark"), ("[tvq]", "Did you mean video/tvqa")):
        with pytest.raises(SystemExit):
            scored(dataset, tmp_path, "--evaluate.tasks", tasks)
        assert message in capsys.readouterr().err


def test_online_features_are_scored_as_cached_ones_two_pictures_a_row_too(dataset, tmp_path):
    for place, file in enumerate(sorted((dataset / "nlvr").glob("test*.npz"))):
        noise = np.random.default_rng(place).integers(0, 256, (9, 14, 3), np.uint8)
        (tmp_path / "images" / "nlvr").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "images" / "nlvr" / f"{file.stem}.png")
    encoder = load_encoder("pixels:12", "grid")
    extract(tmp_path / "images" / "nlvr", tmp_path / "nlvr", encoder, say=lambda text: None)
    only = ("--evaluate.tasks", "[nlvr2]", "--data.visual.num_slots", "36", "--data.visual.path", str(tmp_path))
    cached = scored(dataset, tmp_path / "cached", *only)
    online = ("--data.visual.mode", "online", "--data.visual.encoder", "pixels:12", "--data.visual.kind", "grid")
    assert scored(dataset, tmp_path / "online", *only, *online) == cached and len(cached) == 6
    logits = [[row.get("scores") for row in predictions(tmp_path / name)] for name in ("cached", "online")]
    assert logits[0] == logits[1]
