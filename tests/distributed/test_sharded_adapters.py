"""Init, save, load, merge and export under ZeRO-3 give what they give without it, one layer at a time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cases import VOCAB, make_engine, train_steps
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from dora_core.adapters import (
    AdapterConfig,
    load_adapter,
    merge_adapters,
    merge_and_unload,
    save_adapter,
    unmerge_adapters,
)
from dora_core.adapters.sharded import gathered, is_partitioned
from dora_core.engine.export import save_model
from dora_core.testing.ranks import run_on_ranks

CONFIG = {"kind": "dora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"], "magnitude_targets": ["o_proj"]}
PROBE = torch.arange(24).reshape(2, 12) % VOCAB


def released(model) -> bool:
    """Whether no rank holds a whole parameter of its own accord."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in model.parameters() if is_partitioned(p))


def logits(engine):
    with engine.evaluating(), torch.no_grad():
        return engine(input_ids=PROBE, use_cache=False).logits.clone()


def whole_weights(model):
    weights = {}
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            weights[name] = parameter.detach().clone()
    return weights


def adapter_life(world, model_folder, folder, stage):
    """Train, save, load into a new model, merge, unmerge, export; return what can be compared between stages."""
    folder = Path(folder) / f"stage{stage}"
    engine = make_engine(world, model_folder, {"stage": stage, "adapter": CONFIG})
    fresh = {n: w for n, w in whole_weights(engine.module).items() if n.endswith("magnitude")}
    train_steps(engine, 0, 4)
    trained = logits(engine)
    save_adapter(engine.module, AdapterConfig(**CONFIG), folder / "adapter", str(model_folder))
    world.barrier()
    assert released(engine.module)

    other = make_engine(world, model_folder, {"stage": stage, "adapter": CONFIG})
    load_adapter(other.module, folder / "adapter")
    assert released(other.module)
    loaded = logits(other)

    before = whole_weights(other.module)
    probe = {"input_ids": PROBE, "use_cache": False}
    report = merge_adapters(other.module, probe)
    assert released(other.module)
    merged = logits(other)
    unmerge_adapters(other.module, probe)
    after = whole_weights(other.module)
    exact = all(torch.equal(before[name], after[name]) for name in before)
    save_model(other.module, folder / "direct", "fp32")
    assert released(other.module)
    merge_and_unload(other.module, probe)
    save_model(other.module, folder / "merged", "fp32")
    world.barrier()
    assert released(other.module)
    return {
        "fresh": fresh,
        "trained": trained,
        "loaded": loaded,
        "merged": merged,
        "difference": report.max_logit_difference,
        "exact": exact,
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_adapter_lives_the_same_life_in_stage_3(model_folder, tmp_path, world_size):
    plain = run_on_ranks(adapter_life, world_size, model_folder, tmp_path, 0)[0]
    sharded = run_on_ranks(adapter_life, world_size, model_folder, tmp_path, 3)[0]
    for name, magnitude in plain["fresh"].items():
        assert torch.equal(magnitude, sharded["fresh"][name]), name
    for result in (plain, sharded):
        assert torch.equal(result["trained"], result["loaded"])
        assert (result["merged"] - result["loaded"]).abs().max() < 1e-5
        assert 0 < result["difference"] < 1e-5
        assert result["exact"]
    assert torch.allclose(plain["trained"], sharded["trained"], atol=1e-5)
    files = [load_file(tmp_path / f"stage{stage}" / "adapter" / "adapter_model.safetensors") for stage in (0, 3)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.allclose(files[0][key], files[1][key], atol=1e-5) for key in files[0])
    for stage in ("stage0", "stage3"):
        direct, merged = (load_file(tmp_path / stage / name / "model.safetensors") for name in ("direct", "merged"))
        assert direct.keys() == merged.keys() and all(torch.equal(direct[key], merged[key]) for key in direct)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "stage3" / "merged")
    assert set(model.state_dict()) == set(LlamaForCausalLM.from_pretrained(model_folder).state_dict())
    with torch.no_grad():
        assert torch.allclose(model(PROBE).logits, sharded["merged"], atol=1e-6)
