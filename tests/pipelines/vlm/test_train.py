"""Whole runs: ranks without images, bad rows, stage 1, full fine-tuning, resuming on shards."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from dora_core.data.shards import write_shards
from dora_core.testing.contracts import train_tiny
from dora_core.testing.ranks import RankError, run_on_ranks
from dora_core.training.checkpoint import CheckpointStore
from dora_core.training.metrics import read_metrics
from pipelines.vlm.config import ModelSection
from pipelines.vlm.model import load_llava, load_tokenizer
from pipelines.vlm.original import read_projector

COLOURS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230)}
RELEASE_ALWAYS = (
    "{stage3_param_persistence_threshold: 0, stage3_max_live_parameters: 0, stage3_max_reuse_distance: 0, "
    "stage3_prefetch_bucket_size: 0}"
)
HANG_S = 120.0


def talk(number: int, question: str, answer: str, **fields) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": str(number), **fields, "conversations": turns}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sixteen rows: eight about pictures, eight of text alone; the same in two shards."""
    folder = tmp_path_factory.mktemp("vlm")
    (folder / "images").mkdir()
    rows, samples = [], []
    for number in range(16):
        colour = list(COLOURS)[number % 3]
        row = talk(number, f"how many shapes are there {number}", "one")
        if number % 2:
            Image.new("RGB", (24, 16), COLOURS[colour]).save(folder / "images" / f"{number}.png")
            row = talk(number, "<image>\nwhat colour is it", colour, image=f"{number}.png")
        rows.append(row)
        sample = {"__key__": f"{number:03d}", "json": json.dumps(row).encode()}
        samples.append(sample | ({"png": (folder / "images" / f"{number}.png").read_bytes()} if number % 2 else {}))
    (folder / "rows.json").write_text(json.dumps(rows))
    write_shards(samples, folder / "shards", max_count=8)
    return folder


def train(folder: Path, llava_folder: Path, world_size: int, run: str, **overrides) -> list[float]:
    settings = {
        "model.path": llava_folder,
        "data.train": "[rows.json]",
        "data.images": "images",
        "data.num_validation": 0,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 1,
        "train.max_steps": 4,
        "train.schedule": "constant",
        "train.eval_every": "null",
        "train.save_every": 4,
        **overrides,
    }
    return run_on_ranks(train_tiny, world_size, "vlm", folder, run, settings, timeout_s=HANG_S)[0]


def test_ranks_whose_rows_have_no_image_keep_step_with_those_that_have_under_zero_3(folder, llava_folder):
    expected = train(folder, llava_folder, 1, "one-rank", **{"deepspeed.config": "zero0"})
    for stage in ("zero2", "zero3"):
        for checkpointing in ("false", "true"):
            extra = {"deepspeed.extra": RELEASE_ALWAYS} if stage == "zero3" else {}
            losses = train(
                folder,
                llava_folder,
                2,
                f"{stage}-{checkpointing}",
                **{"deepspeed.config": stage, "train.gradient_checkpointing": checkpointing},
                **extra,
            )
            assert losses == pytest.approx(expected, abs=1e-5), stage


def test_an_assembled_model_with_a_new_token_trains_under_zero_3_as_without(folder, llava_folder, tmp_path):
    from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

    whole = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    torch.manual_seed(0)
    LlamaForCausalLM(whole.config.text_config).save_pretrained(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(llava_folder)
    tokenizer.add_tokens(["<another>"])  # more tokens than the model has rows
    tokenizer.save_pretrained(tmp_path / "lm")
    CLIPVisionModel(whole.config.vision_config).save_pretrained(tmp_path / "tower")
    parts = {
        "model.path": "null",
        "model.language_model": tmp_path / "lm",
        "model.vision_tower": tmp_path / "tower",
    }
    expected = train(folder, llava_folder, 1, "parts-1", **parts)
    losses = train(
        folder, llava_folder, 2, "parts-3", **parts, **{"deepspeed.config": "zero3", "deepspeed.extra": RELEASE_ALWAYS}
    )
    assert losses == pytest.approx(expected, abs=1e-5)


def test_rows_grouped_by_modality_are_all_seen_and_shards_train_as_json_does(folder, llava_folder):
    grouped = {"data.group_by_modality": "true", "train.lr": 1e-9}
    losses = train(folder, llava_folder, 1, "json", **grouped)
    rows = read_metrics(folder / "runs" / "json" / "metrics.jsonl")
    totals = [0, *(row["num_images"] for row in rows)]
    assert sorted(b - a for a, b in itertools.pairwise(totals)) == [0, 0, 4, 4]
    assert rows[-1]["num_rows"] == 16
    from_shards = train(
        folder, llava_folder, 1, "shards", **grouped, **{"data.train": "[shards]", "data.images": "null"}
    )
    assert sum(from_shards) == pytest.approx(sum(losses), rel=0.05)  # lengths of shards are of their json


def test_a_run_on_shards_resumes_to_the_bit(folder, llava_folder):
    shards = {"data.train": "[shards]", "data.images": "null", "adapter.dropout": 0.1, "train.save_every": 2}
    whole = train(folder, llava_folder, 2, "whole", **shards)
    train(folder, llava_folder, 2, "parts", **shards, **{"train.max_steps": 2})
    assert train(folder, llava_folder, 2, "parts", **shards, **{"run.resume": "must"}) == whole


def damage(folder: Path, name: str, num: int) -> str:
    rows = json.loads((folder / "rows.json").read_text())
    for row in [row for row in rows if "image" in row][:num]:
        row["image"] = "gone.png"
    (folder / name).write_text(json.dumps(rows))
    return f"[{name}]"


def test_unreadable_rows_are_counted_written_down_and_left_out(folder, llava_folder):
    some = {"data.train": damage(folder, "some.json", 2), "data.max_bad_fraction": 0.2}
    for world_size in (1, 2):
        train(folder, llava_folder, world_size, f"bad{world_size}", **some)
        run = folder / "runs" / f"bad{world_size}"
        bad = read_metrics(run / "bad_rows.jsonl")
        assert sorted(row["row"] for row in bad) == ["some.json, row 2, id '1'", "some.json, row 4, id '3'"]
        assert all("gone.png" in row["reason"] for row in bad)
        assert read_metrics(run / "metrics.jsonl")[-1]["num_bad"] == 2


def test_too_many_unreadable_rows_end_the_run_with_a_message(folder, llava_folder):
    many = {"data.train": damage(folder, "many.json", 6), "data.max_bad_fraction": 0.2}
    with pytest.raises(RankError, match=r"cannot be used; data.max_bad_fraction 0.2 allows 3.*gone.png"):
        train(folder, llava_folder, 2, "too-bad", **many)
    store = CheckpointStore(folder / "runs" / "too-bad" / "checkpoints")
    assert store.newest() in (2, 3)  # what was learned until then is kept


def test_stage_1_trains_the_projector_alone_and_leaves_llavas_file(folder, llava_folder):
    stage_1 = {"adapter.kind": "none", "data.template": "plain", "train.lr": 0.01, "deepspeed.config": "zero3"}
    train(folder, llava_folder, 2, "stage-1", **stage_1)
    found = read_projector(str(folder / "runs" / "stage-1" / "projector" / "mm_projector.bin"))
    section = ModelSection(path=str(llava_folder))
    model, _ = load_llava(section, load_tokenizer(section), "fp32")
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert not torch.equal(found[name], parameter)
    given = ModelSection(
        path=str(llava_folder), projector=str(folder / "runs" / "stage-1" / "projector" / "mm_projector.bin")
    )
    loaded, _ = load_llava(given, load_tokenizer(given), "fp32")
    assert torch.equal(loaded.model.multi_modal_projector.linear_1.weight, found["linear_1.weight"])


def test_full_fine_tuning_leaves_a_whole_llava_whose_tower_is_unchanged(folder, llava_folder):
    full = {"adapter.kind": "full", "adapter.targets": "'.*'", "deepspeed.config": "zero3", "train.projector_lr": 1e-3}
    train(folder, llava_folder, 2, "full", **full)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "runs" / "full" / "model")
    base = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    for (name, own), (_, other) in zip(model.named_parameters(), base.named_parameters(), strict=True):
        assert torch.equal(own, other) == ("vision_tower" in name), name
    assert (folder / "runs" / "full" / "model" / "preprocessor_config.json").is_file() or (
        folder / "runs" / "full" / "model" / "processor_config.json"
    ).is_file()


def test_the_projector_is_in_the_adapters_file_and_in_half_precision_runs_trains_in_fp32(folder, llava_folder):
    train(folder, llava_folder, 1, "bf16", **{"train.precision": "bf16", "train.lr": 1e-2})
    state = load_file(folder / "runs" / "bf16" / "adapter" / "adapter_model.safetensors")
    projector = {name: tensor for name, tensor in state.items() if "projector" in name}
    assert len(projector) == 4 and {tensor.dtype for tensor in projector.values()} == {torch.float32}
