"""Whole models on disk: in shards that transformers reads, and what happens where there is no room."""

from __future__ import annotations

import shutil
import weakref
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dora_core.adapters import AdapterConfig, apply_adapters, merge, merge_and_unload, save_adapter
from dora_core.adapters.checkpoint import write_tensors
from dora_core.adapters.linear import LoRALinear
from dora_core.adapters.merge import merged_weight
from dora_core.engine import export
from dora_core.engine.export import merge_to_folder, save_model
from dora_core.testing.limits import limited_file_size
from dora_core.testing.ranks import run_on_ranks

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LIMIT = 40_000
"""Bytes of a shard here: the model is 75 kB in fp32."""


def llama(vocab_size: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **SIZES))


def test_shards_are_read_by_transformers_and_replace_an_older_model(tmp_path, monkeypatch):
    model = llama()
    save_model(model, tmp_path, "fp32")
    assert (tmp_path / "model.safetensors").is_file()
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", LIMIT)
    save_model(model, tmp_path, "bf16")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert all(shard.stat().st_size < LIMIT + 5_000 for shard in shards)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor.bfloat16(), again[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_room_is_refused_before_it_is_merged_and_replaces_nothing(tmp_path, monkeypatch):
    model, config = llama(), AdapterConfig(rank=4, targets=["q_proj"])
    apply_adapters(model, config)
    save_adapter(model, config, tmp_path / "adapter")
    save_model(llama(), tmp_path / "merged", "fp32")
    old = (tmp_path / "merged" / "model.safetensors").read_bytes()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 0))
    with pytest.raises(ValueError, match=r"weights in bf16 take 0\.0 GiB, and .*elsewhere has room for 0\.0 GiB"):
        merge_to_folder(llama(), tmp_path / "adapter", tmp_path / "elsewhere", "bf16")
    assert not (tmp_path / "elsewhere").exists()
    merge_to_folder(llama(), tmp_path / "adapter", tmp_path / "merged", "fp32")  # as large as what it replaces
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == old  # the adapter was fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_an_adapted_model_is_written_as_it_would_be_merged_with_one_merged_weight_at_a_time(
    tmp_path, monkeypatch, kind, dtype
):
    model = llama().to(dtype)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    magnitudes = {"magnitude_targets": ["o_proj"]} if kind == "dora" else {}
    apply_adapters(model, AdapterConfig(kind=kind, rank=4, targets=["q_proj", "up_proj"], **magnitudes))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("magnitude")), std=0.1)
    alive: list[weakref.ref] = []

    def counted(layer: LoRALinear) -> torch.Tensor:
        assert sum(weight() is not None for weight in alive) <= 1
        weight = merged_weight(layer)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(merge, "merged_weight", counted)
    monkeypatch.setattr(export, "merged_weight", counted)
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 1)
    report = merge.compare_merged(model)
    save_model(model, tmp_path / "direct", "fp32")
    assert len(alive) == 2 * report.num_layers == 2 * (6 if kind == "dora" else 4)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
    assert report == merge_and_unload(model)
    save_model(model, tmp_path / "merged", "fp32")
    direct, merged = (
        {name: tensor for file in (tmp_path / folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in ("direct", "merged")
    )
    assert direct.keys() == merged.keys() == base.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in direct.items())


def save_on_a_full_disk(world, folder):
    """Save a model whose larger layers, from the fifth shard on, cannot be written; return what was said."""
    export.MAX_SHARD_BYTES, usual = 8_100, export.MAX_SHARD_BYTES
    try:
        with limited_file_size(7_000):
            save_model(llama(vocab_size=16), folder, "fp32")
    except ValueError as error:
        return str(error)
    finally:
        export.MAX_SHARD_BYTES = usual
    return "saved"


def test_a_base_is_not_replaced_by_what_is_made_of_it(tmp_path):
    save_model(llama(), tmp_path, "fp32")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds the weights that the model is made of"):
        save_model(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "x" / "..", "bf16")
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_file_that_cannot_be_written_is_one_error_on_every_rank_and_leaves_no_weights(tmp_path):
    save_model(llama(), tmp_path, "fp32")
    for said in run_on_ranks(save_on_a_full_disk, 2, tmp_path):
        assert "model-00005-of-00000.safetensors could not be written" in said and "which holds no weights now" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "generation_config.json"]


def save_where_a_folder_is(world, folder, name):
    """Save a model where a folder is in the way of a file; return what was said."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    world.barrier()
    try:
        save_model(llama(), folder, "fp32")
    except ValueError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_only_rank_0_cannot_do_is_an_error_on_every_rank(tmp_path, name):
    for said in run_on_ranks(save_where_a_folder_is, 2, tmp_path / name, name):
        assert f"could not be written to {tmp_path / name}" in said and "Make room or check permissions" in said
    assert not [file for file in (tmp_path / name).glob("model*") if file.is_file()]


def save_adapter_on_a_full_disk(world, folder):
    """Save an adapter that has no room; return what was said."""
    model, config = llama(), AdapterConfig(rank=4, targets=["q_proj"])
    apply_adapters(model, config)
    try:
        with limited_file_size(1_000):
            save_adapter(model, config, folder)
    except ValueError as error:
        return str(error)
    return "saved"


def test_an_adapter_that_cannot_be_written_is_an_error_on_every_rank(tmp_path):
    for said in run_on_ranks(save_adapter_on_a_full_disk, 2, tmp_path):
        assert "adapter_model.safetensors could not be written" in said and "Make room" in said
    assert not list(tmp_path.iterdir())


def test_tensors_that_cannot_be_written_leave_the_old_file(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    write_tensors({"a": torch.ones(4)}, file)
    with limited_file_size(2_000), pytest.raises(OSError, match="could not be written"):
        write_tensors({"a": torch.ones(4_000)}, file)
    assert torch.equal(load_file(file)["a"], torch.ones(4)) and len(list(tmp_path.iterdir())) == 1
