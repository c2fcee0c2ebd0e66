"""When Liger's kernels are used, what is said of it, and that a model trains with them as without.

Without a GPU the kernels are run by Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from families import adapt, batch, make

import dora_core.engine
from dora_core.config import ConfigError, TrainSection
from dora_core.engine import liger
from dora_core.engine.liger import LigerReport, use_liger

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NEEDS_LIGER = pytest.mark.skipif(sys.platform != "linux", reason="liger-kernel needs Triton, which is for Linux")
# As regular expressions: Liger 0.8.5 also replaces the norms of Qwen 3's queries and keys.
LAYERS = {
    "llama": "RMSNorm in 5 layers, RoPE in 2 layers, SwiGLU in 2 layers",
    "qwen3": "RMSNorm in (5|9) layers, RoPE in 2 layers, SwiGLU in 2 layers",
    "gemma": "RMSNorm in 5 layers, RoPE in 2 layers",
    "gemma2": "RMSNorm in 9 layers, RoPE in 2 layers",
}
WHOLE_LOGITS = "the loss is from whole logits, which a {} may scale or cap"
SAID = {
    **{f: f"{LAYERS.get(f, LAYERS['llama'])}, linear cross-entropy" for f in liger.LOGITS_AS_THEY_ARE},
    "gemma2": f"{LAYERS['gemma2']}; {WHOLE_LOGITS.format('gemma2')}",
    "bart": "linear cross-entropy; none of its layers is for a bart",
    "cohere": f"none; none of its layers is for a cohere; {WHOLE_LOGITS.format('cohere')}",
}
CASES = [*SAID, "llama-3", "llama+checkpointing", "llama+full", "llava+checkpointing", "bart+full"]


def train(choice: str) -> TrainSection:
    return TrainSection(lr=1e-3, liger=choice)


def test_it_is_on_by_default_where_there_is_cuda():
    assert TrainSection(lr=1e-3).liger == "auto"


def test_off_leaves_the_model_as_it_is():
    model = make("llama")
    assert str(use_liger(model, train("off"), CUDA)) == "Liger kernels: none; train.liger is off"
    assert not hasattr(model, "loss_head")
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_on_a_cpu_auto_uses_nothing_and_says_why():
    model = make("llama")
    said = str(use_liger(model, train("auto"), CPU))
    assert said == "Liger kernels: none; they need a CUDA GPU and the run is on the cpu"
    assert not hasattr(model, "loss_head")


def test_on_a_cpu_on_is_an_error_that_says_what_to_change():
    with pytest.raises(ConfigError) as raised:
        use_liger(make("llama"), train("on"), CPU)
    message = str(raised.value)
    assert message.startswith("train.liger is 'on', but they need a CUDA GPU and the run is on the cpu. ")
    assert "bart, gemma, gemma2, llama, llava" in message and message.endswith("Set train.liger: auto, or off.")


def test_without_the_package_auto_says_so_and_on_is_an_error(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.delitem(sys.modules, "dora_core.engine.liger_kernels", raising=False)
    monkeypatch.delattr(dora_core.engine, "liger_kernels", raising=False)
    said = str(use_liger(make("llama"), train("auto"), CUDA))
    assert said.startswith("Liger kernels: none; liger-kernel cannot be imported (")
    with pytest.raises(ConfigError, match="liger-kernel cannot be imported"):
        use_liger(make("llama"), train("on"), CUDA)


@NEEDS_LIGER
def test_a_model_that_nothing_fits_is_an_error_with_on_alone():
    model = make("cohere")
    assert str(use_liger(model, train("auto"), CUDA)) == f"Liger kernels: {SAID['cohere']}"
    with pytest.raises(ConfigError, match=r"on', but none of its layers is for a cohere; .*Set train.liger: auto"):
        use_liger(model, train("on"), CUDA)
    assert not hasattr(model, "loss_head")


@NEEDS_LIGER
def test_on_is_content_with_the_part_that_fits():
    assert use_liger(make("bart"), train("on"), CUDA).used == ("linear cross-entropy",)


@NEEDS_LIGER
def test_an_adapted_output_layer_is_said():
    report = use_liger(adapt(make("llama"), targets=["lm_head"]), train("auto"), CUDA)
    assert report.used[-1] == "cross-entropy in chunks (the output layer is adapted)"


@NEEDS_LIGER
def test_an_activation_that_liger_does_not_compute_stays():
    model = make("llama", hidden_act="gelu")
    assert use_liger(model, train("auto"), CUDA).used[:2] == ("RMSNorm in 5 layers", "RoPE in 2 layers")
    assert not any("forward" in layer.mlp.__dict__ for layer in model.model.layers)


@NEEDS_LIGER
def test_other_models_of_the_process_keep_their_own_kernels():
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    use_liger(make("llama"), train("on"), CUDA)
    assert dict(vars(modeling_llama)) == before
    assert not any("forward" in module.__dict__ for module in make("llama").modules())


@NEEDS_LIGER
def test_in_evaluation_mode_a_model_computes_without_liger():
    model, same = make("llama").eval(), make("llama").eval()
    use_liger(model, train("on"), CUDA)
    inputs, _, _ = batch(model)
    assert torch.equal(model(**inputs).logits, same(**inputs).logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), same.generate(**inputs, max_new_tokens=3))


@NEEDS_LIGER
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_liger_cuda.py runs the kernels themselves")
def test_a_model_trains_with_the_kernels_as_without():
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 8):
        pytest.skip("the interpreter of Triton before 3.8 does not know the numbers of today's numpy")
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run(
        [sys.executable, script, *CASES],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["name"] for result in results] == CASES
    for result in results:
        family = result["name"].split("+")[0].removesuffix("-3")
        assert re.fullmatch(f"Liger kernels: {SAID[family]}", result["report"]), result
        assert result["loss"] < 1e-6 and result["gradients"] < 2e-5, result
        assert result["same_logits"], result
        assert result["num_outputs"] or "full" in result["name"]
        assert result["outputs_are_left_alone"], result


def test_a_report_names_what_is_used_and_why_the_rest_is_not():
    assert str(LigerReport(("a", "b"), ("c is d",))) == "Liger kernels: a, b; c is d"
