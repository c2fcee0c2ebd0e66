"""The speed benchmarks run on a CPU with tiny sizes, and what they compare is comparable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import adapter_variants
import attention
import device_timing
import generation_time
import kernel_forms
import measuring
import step_kernels
import step_time
import zero_step_time
from adapter_variants import TINY, VARIANTS, adapted, build_model, checkpointed, input_gradients

from dora_core.adapters import LoRALinear
from dora_core.testing.ranks import run_on_ranks

CPU = torch.device("cpu")
TOKENS = torch.arange(16)[None]


@pytest.fixture(scope="module")
def model():
    return build_model(TINY, torch.float32, CPU)


def test_a_regime_is_read_from_its_name():
    regime = measuring.Regime.parse("8x2048-ckpt-r32")
    assert (regime.batch, regime.tokens, regime.checkpointing, regime.rank) == (8, 2048, True, 32)
    assert not measuring.Regime.parse("1x16-r8").checkpointing
    with pytest.raises(ValueError, match="8x2048-ckpt-r32"):
        measuring.Regime.parse("8*2048")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_and_leaves_the_base_as_it_was(model, name):
    kinds = {key: type(module) for key, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with input_gradients(model), adapted(model, VARIANTS[name], 4) as called, checkpointed(model, True):
        called(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        trained = {key: p for key, p in called.named_parameters() if p.requires_grad}
        assert all(p.grad is not None and p.grad.any() for p in trained.values())
        per_layer = 0 if name == "floor" else {"lora": 2, "dora": 3}[VARIANTS[name].kind]
        assert len(trained) == TINY.layers * len(adapter_variants.TARGETS) * per_layer
    assert {key: type(module) for key, module in model.named_modules()} == kinds
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not model.is_gradient_checkpointing and not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_and_ours_compute_the_same_with_the_same_adapter(model, kind):
    with adapted(model, VARIANTS[f"ours-{kind}"], 4), torch.no_grad():
        layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, LoRALinear)}
        ours = model(input_ids=TOKENS).logits
    with adapted(model, VARIANTS[f"peft-{kind}"], 4) as called, torch.no_grad():
        for key, layer in layers.items():
            theirs = model.get_submodule(key)
            theirs.lora_A["default"].weight.copy_(layer.lora_A)
            theirs.lora_B["default"].weight.copy_(layer.lora_B)
            if kind == "dora":
                theirs.lora_magnitude_vector["default"].weight.copy_(layer.magnitude)
        torch.testing.assert_close(called(input_ids=TOKENS).logits, ours, rtol=1e-4, atol=1e-5)
    assert len(layers) == TINY.layers * len(adapter_variants.TARGETS)


def test_step_times_are_kept_when_a_variant_fails(tmp_path, monkeypatch, capsys):
    def refuse(model, config):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(adapter_variants, "apply_adapters", refuse)
    own = ["--tiny", "--device", "cpu", "--variants", "peft-lora,ours-dora", "--output", str(tmp_path)]
    assert step_time.main(own) == 1
    content = json.loads((tmp_path / "step_time.json").read_text())
    rows = [row for row in content["rows"] if row["regime"] == "1x16-r8"]
    assert [row["variant"] for row in rows] == ["floor", "peft-lora", "ours-dora", "floor-again"]
    assert "no memory left" in rows[2]["error"] and rows[2]["ratio_to_floor"] is None
    assert rows[1]["ratio_to_floor"] == pytest.approx(
        2 * rows[1]["median_ms"] / (rows[0]["median_ms"] + rows[3]["median_ms"])
    )
    assert all(row.get("base_unchanged", True) for row in content["summary"])
    assert str(tmp_path) not in json.dumps(content["settings"])
    assert (tmp_path / "step_time.png").is_file()
    (tmp_path / "step_time.png").unlink()
    assert step_time.main([*own, "--plot-only"]) == 0
    assert (tmp_path / "step_time.png").is_file()


def test_generation_is_timed_for_the_base_and_the_unmerged_adapters(tmp_path):
    own = ["--tiny", "--device", "cpu", "--batches", "2", "--output", str(tmp_path)]
    assert generation_time.main(own) == 0
    rows = json.loads((tmp_path / "generation_time.json").read_text())["rows"]
    assert {row["variant"] for row in rows} == {"base", *generation_time.DEFAULT_VARIANTS.split(",")[1:]}
    assert all(row["ratio_to_peft_lora"] > 0 for row in rows)


def zero_rows(world, folder):
    assert zero_step_time.main(["--tiny", "--output", folder]) == 0
    return json.loads((Path(folder) / "zero_step_time.json").read_text())["rows"]


def test_the_step_under_every_zero_stage_is_the_plain_step(tmp_path):
    (rows,) = run_on_ranks(zero_rows, 1, str(tmp_path))
    assert [row["way"] for row in rows] == ["plain", "zero0", "zero2", "plain", "zero3"]
    for row in rows:
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], abs=1e-6)
        assert row["last_loss"] == pytest.approx(rows[0]["last_loss"], abs=1e-5)
        assert row["last_loss"] != row["first_loss"]
    assert rows[-1]["over_zero2_ms"] == pytest.approx(rows[-1]["median_ms"] - rows[2]["median_ms"])


def test_kernels_of_a_step_are_told_by_variant(tmp_path):
    own = ["--tiny", "--device", "cpu", "--variants", "floor,ours-dora", "--output", str(tmp_path)]
    assert step_kernels.main(own) == 0
    rows = json.loads((tmp_path / "step_kernels.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["floor", "ours-dora"]
    assert all(0 < sum(time for time, _ in row["kernels"].values()) <= row["kernels_ms"] + 1e-2 for row in rows)


def test_every_operator_and_form_is_timed_in_the_interpreter(tmp_path):
    script = Path(device_timing.__file__).with_name("kernels.py")
    command = [sys.executable, str(script), "--tiny", "--device", "cpu", "--output", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    content = json.loads((tmp_path / "kernels.json").read_text())
    rows = content["operators"] + content["forms"] + content["dense"]
    assert content["peaks"]["copy_gb_per_s"] > 0 and len(rows) == 15, done.stderr
    assert not [row["error"] for row in rows if "error" in row]


def test_attention_is_timed_by_shape_and_backend(tmp_path, monkeypatch):
    monkeypatch.setitem(attention.SHAPES, "small", (2, 2, 8, 16, 8, "padded"))
    own = ["--device", "cpu", "--shapes", "small", "--backends", "default,cudnn,math", "--output", str(tmp_path)]
    assert attention.main(own) == 0
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert ["error" in row for row in rows] == [False, True, False]
    assert all(row["first_ms"] > 0 and row["again_us"] > 0 for row in rows if "error" not in row)


def test_calls_take_turns_over_all_copies_of_their_operands():
    places: list[int] = []
    (found,) = device_timing.time_calls([places.append], 3, CPU)
    assert set(places) == {0, 1, 2} and found.us > 0 and found.hidden
    assert device_timing.num_bytes((torch.zeros(3), [torch.zeros(2, dtype=torch.bfloat16)], None, 1.0)) == 16


def test_the_worst_choice_of_a_form_is_named():
    facts = {"in": 4, "out": 4, "tokens": 2, "rank": 1, "forward": "merged", "backward": "composed"}
    rows = [{**facts, "loss": 0.0}, {**facts, "rank": 2, "loss": 0.05}, {**facts, "error": "failed"}]
    found = kernel_forms.summary(rows)
    assert (found["num_points"], found["num_above_limit"], found["worst"]["rank"]) == (2, 1, 2)
    assert kernel_forms.summary([]) == {}


def test_a_file_of_results_is_whole_and_has_no_nan(tmp_path):
    path = tmp_path / "folder" / "rows.json"
    measuring.write_json(path, {"rows": [{"extra_gib": float("nan"), "us": 1.5}]})
    assert json.loads(path.read_text()) == {"rows": [{"extra_gib": None, "us": 1.5}]}
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(("file", "least_timed"), [("kernels", 99), ("kernels_forms", 100)])
def test_the_cost_rule_is_within_its_limit_of_the_saved_times(file, least_timed):
    rows = json.loads((measuring.RESULTS / f"{file}.json").read_text())["forms"]
    num_timed = 0
    for row in rows:
        sizes = (row["tokens"], row["in"], row["out"], row["rank"])
        chosen = (kernel_forms.choose_form(*sizes), kernel_forms.choose_backward_form(*sizes))
        times = {(form, form): row[f"{form}_us"] for form in ("merged", "composed")}
        fastest = min(times.values())
        times.setdefault((row["forward"], row["backward"]), row["rule_us"])
        if chosen in times:
            num_timed += 1
            assert times[chosen] <= (1 + kernel_forms.LIMIT) * fastest, sizes
    assert num_timed >= least_timed


def test_the_rule_for_dense_layers_is_within_its_limit_of_the_saved_times():
    rows = json.loads((measuring.RESULTS / "kernels_dense.json").read_text())["dense"]
    assert len(rows) == 80
    num_dense = 0
    for row in rows:
        sizes = (row["tokens"], row["in"], row["out"], row["rank"])
        chosen = "dense" if kernel_forms.choose_dense(*sizes, has_bias=True) else "composed"
        num_dense += chosen == "dense"
        assert row[f"{chosen}_us"] <= (1 + kernel_forms.LIMIT) * min(row["dense_us"], row["composed_us"]), sizes
    assert 30 < num_dense < 50
