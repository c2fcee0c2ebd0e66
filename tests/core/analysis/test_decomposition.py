"""Changes of weights against the paper's formulas, for models, adapters and checkpoints."""

import json
import math
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dora_core.adapters import AdapterConfig, apply_adapters, load_adapter, merge_and_unload, save_adapter
from dora_core.analysis.decomposition import decompose
from dora_core.analysis.weights import ModelWeights, Weights, WeightsError, find_key, open_weights
from dora_core.testing.tiny import tiny_llama


def model_of(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def changes(before: Path, after: Path, base: Path | None = None, pattern: str | None = None) -> dict:
    return {c.name: c for c in decompose(open_weights(before, base), open_weights(after, base), pattern)}


def test_the_formulas_on_rows_made_by_hand(tmp_path):
    angle = 1e-6
    old = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    new = torch.tensor(
        [[6.0, 8.0], [0.0, 1.0], [math.cos(angle), math.sin(angle)], [0.0, 0.0], [0.0, 2.0]], dtype=torch.float64
    )
    a = model_of(tmp_path / "a", layers__3__q_proj__weight=old)
    b = model_of(tmp_path / "b", layers__3__q_proj__weight=new)
    (found,) = changes(a, b).values()
    assert (found.layer, found.role, found.num_rows, found.num_columns) == (3, "q_proj", 5, 2)
    assert found.delta_m == pytest.approx((5 + 0 + 0 + 0 + 2) / 5)
    assert found.delta_d == pytest.approx((0 + 1 + angle**2 / 2 + 0 + 1) / 5, rel=1e-14)
    assert found.mean_magnitude == pytest.approx((5 + 1 + 1) / 5)
    only_turned = model_of(tmp_path / "c", layers__3__q_proj__weight=old[2:3])
    turned = model_of(tmp_path / "d", layers__3__q_proj__weight=new[2:3])
    assert changes(only_turned, turned)["layers.3.q_proj.weight"].delta_d == pytest.approx(angle**2 / 2, rel=1e-6)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_llama(300, hidden=32, layers=3, heads=2, intermediate=48).save_pretrained(folder)
    return folder


CONFIGS = {
    "dora": AdapterConfig(kind="dora", rank=4, alpha=8, targets=["q_proj", "down_proj"], magnitude_targets=["k_proj"]),
    "lora": AdapterConfig(
        kind="lora", rank=4, alpha=8, rslora=True, targets=["q_proj"], alpha_pattern={"layers.1.self_attn.q_proj": 3}
    ),
    "pattern": AdapterConfig(
        kind="lora", rank=4, targets=["v_proj"], rank_pattern={"v_proj": 2}, trainable=["gate_proj"]
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_changes_what_its_merged_model_changes(name, base, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    apply_adapters(model, CONFIGS[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(parameter.float())  # as files hold it
    save_adapter(model, CONFIGS[name], tmp_path / "adapter", str(base))
    merge_and_unload(model)
    model.save_pretrained(tmp_path / "merged")
    from_adapter = changes(base, tmp_path / "adapter")
    roles = {"dora": {"q_proj", "down_proj", "k_proj"}, "lora": {"q_proj"}, "pattern": {"v_proj", "gate_proj"}}[name]
    assert {c.role for c in from_adapter.values()} == roles and len(from_adapter) == 3 * len(roles)
    from_models = changes(base, tmp_path / "merged")
    assert len(from_models) == 3 * 7  # every linear layer; embeddings and the output layer are left out
    for key, change in from_models.items():
        if change.role in roles:
            assert change.delta_m == pytest.approx(from_adapter[key].delta_m, rel=1e-9)
            assert change.delta_d == pytest.approx(from_adapter[key].delta_d, rel=1e-9)
            assert change.delta_m > 0
        else:
            assert change.delta_m == change.delta_d == 0
    if name == "dora":
        assert all(c.delta_d < 1e-12 for c in from_adapter.values() if c.role == "k_proj")  # its magnitude alone


def test_from_one_adapter_to_another(base, tmp_path):
    from transformers import AutoModelForCausalLM

    for seed, name in enumerate(("one", "two")):
        model = AutoModelForCausalLM.from_pretrained(base)
        apply_adapters(model, CONFIGS["lora" if seed else "dora"])
        save_adapter(model, CONFIGS["lora" if seed else "dora"], tmp_path / name, str(base))
    found = changes(tmp_path / "one", tmp_path / "two", base)
    assert {c.role for c in found.values()} == {"q_proj", "down_proj", "k_proj"}
    assert all(c.delta_m < 1e-6 and c.delta_d < 1e-12 for c in found.values())  # both are fresh


def test_names_in_memory_and_in_files_may_have_other_prefixes():
    keys = [
        "language_model.model.layers.0.q_proj.weight",
        "vision_tower.vision_model.encoder.layers.0.q_proj.weight",
        "language_model.lm_head.weight",
    ]
    assert find_key("model.language_model.layers.0.q_proj.weight", keys, "x") == keys[0]
    assert find_key("model.vision_tower.vision_model.encoder.layers.0.q_proj.weight", keys, "x") == keys[1]
    assert find_key("lm_head.weight", keys, "x") == keys[2]
    with pytest.raises(WeightsError, match="2 weights could be meant"):
        find_key("layers.0.q_proj.weight", keys, "x")
    with pytest.raises(WeightsError, match="no weight is called so"):
        find_key("model.layers.7.q_proj.weight", keys, "x")


def test_bin_files_and_shards_hold_what_safetensors_hold(base, tmp_path):
    model = tiny_llama(300, hidden=32, layers=3, heads=2, intermediate=48)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len([*(tmp_path / "sharded").glob("*.safetensors")]) > 2
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for other in ("sharded", "bin"):
        found = changes(base, tmp_path / other)
        assert len(found) == 21 and all(c.delta_m == c.delta_d == 0 for c in found.values())


def test_what_cannot_be_compared_is_said(base, tmp_path):
    with pytest.raises(WeightsError, match=r"is \[2, 3\] and was \[2, 2\]"):
        changes(
            model_of(tmp_path / "a", layers__0__q__weight=torch.ones(2, 2)),
            model_of(tmp_path / "b", layers__0__q__weight=torch.ones(2, 3)),
        )
    with pytest.raises(WeightsError, match="no matrix matches 'nothing'"):
        changes(base, base, pattern="nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="holds none of"):
        open_weights(tmp_path / "empty")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(WeightsError, match="Copy or save the model again"):
        open_weights(tmp_path / "cut")
    with pytest.raises(WeightsError, match="is no folder"):
        open_weights("no/such/model/at/all")
    model = tiny_llama(300, hidden=32, layers=1, heads=2, intermediate=48)
    apply_adapters(model, CONFIGS["lora"].__class__(rank=2, targets=["q_proj"]))
    save_adapter(model, AdapterConfig(rank=2, targets=["q_proj"]), tmp_path / "adapter")
    with pytest.raises(WeightsError, match="names no base model"):
        open_weights(tmp_path / "adapter")
    assert load_adapter(tiny_llama(300, hidden=32, layers=1, heads=2, intermediate=48), tmp_path / "adapter")


def anonymous_mib() -> float:
    """Memory of this process that is no page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_a_model_is_never_in_memory(tmp_path):
    size, num_layers = 2048, 24  # 192 MiB in bf16
    places = {}
    (tmp_path / "big").mkdir()
    for layer in range(num_layers):
        name = f"model.layers.{layer}.q_proj.weight"
        places[name] = f"{layer}.safetensors"
        save_file({name: torch.full((size, size), 0.5, dtype=torch.bfloat16)}, tmp_path / "big" / places[name])
    (tmp_path / "big" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    base = ModelWeights.open(tmp_path / "big")
    factors = {"lora_A": torch.ones(2, size), "lora_B": torch.ones(size, 2), "magnitude": torch.ones(size)}
    modules = {name.removesuffix(".weight"): factors for name in places}
    after = Weights(base, modules, config=AdapterConfig(rank=2, alpha=2))
    before, peak, done = anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_mib())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = list(decompose(Weights(base), after))
    done.set()
    watcher.join()
    assert len(found) == num_layers and peak[0] - before < 96
    assert found[0].delta_m == pytest.approx(0.5 * size**0.5 - 1) and found[0].delta_d < 1e-12
