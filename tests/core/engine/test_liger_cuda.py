"""Liger's kernels on a GPU: losses and gradients within rounding of the plain ones, and no logits of all tokens."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from families import adapt, batch, gradients, largest_difference, make

from dora_core.adapters import reuse_norms
from dora_core.config import TrainSection
from dora_core.engine.build import DTYPES, narrow_forward
from dora_core.engine.liger import LOGITS_AS_THEY_ARE, use_liger
from dora_core.engine.loss import summed_cross_entropy
from dora_core.registry import PIPELINES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = torch.device("cuda")
FAMILIES = (*LOGITS_AS_THEY_ARE, "gemma2", "llama-3")
FULL = {"kind": "full", "targets": ".*"}
ADAPTERS = {
    "dora": {},
    "full norm gradient": {"norm_gradient": "full"},
    "full fine-tuning": FULL,
    "adapted output layer": {"targets": ["q_proj", "gate_proj", "lm_head"]},
    "norms": {"trainable": ["norm", "input_layernorm"]},
}
SIZES = {"hidden_size": 256, "intermediate_size": 688, "head_dim": 64, "vocab_size": 4003, "initializer_range": 0.06}


def prepare(family: str, dtype: torch.dtype, options: dict, *, checkpointing: bool = False, **changes):
    """Return a model on the GPU, its frozen weights in ``dtype``, adapted, without Liger."""
    model = make(family, **changes).to(DEVICE, dtype)
    adapt(model, **options)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def with_liger(model):
    changed = copy.deepcopy(model)
    assert use_liger(changed, TrainSection(lr=1e-3, liger="on"), DEVICE).used
    return changed


def losses_and_gradients(model, precision: str = "fp32"):
    inputs, labels, weights = batch(model)
    narrow_forward(model, precision, DEVICE.type)
    found = []
    with reuse_norms(model):
        for weighting in (None, weights):
            loss = summed_cross_entropy(model, inputs, labels, weighting)
            (loss * 0.37).backward()  # as an engine, which divides by the number of targets
            found.append((loss.item(), gradients(model)))
    return found


def relative(found: dict, expected: dict) -> float:
    """Return the relative difference of all gradients together."""
    assert found.keys() == expected.keys() and expected
    difference = sum(float((found[name] - each).square().sum()) for name, each in expected.items())
    return (difference / sum(float(each.square().sum()) for each in expected.values())) ** 0.5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_fp32_losses_and_gradients_are_the_plain_ones(family, checkpointing):
    model = prepare(family, torch.float32, {}, checkpointing=checkpointing)
    for (found, own), (expected, plain) in zip(
        losses_and_gradients(with_liger(model)), losses_and_gradients(model), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-5)
        assert largest_difference(own, plain) < 1e-4


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_in_fp32_everything_that_is_trained_gets_its_gradient(adapter):
    model = prepare("llama", torch.float32, ADAPTERS[adapter], **SIZES)
    for (found, own), (expected, plain) in zip(
        losses_and_gradients(with_liger(model)), losses_and_gradients(model), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-5)
        assert largest_difference(own, plain) < 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("family", "adapter", "checkpointing", "changes"),
    [
        ("llama", "dora", False, SIZES),
        ("llama", "dora", True, SIZES),
        ("llama", "full norm gradient", True, SIZES),
        ("llama", "full fine-tuning", False, SIZES),
        ("llama", "adapted output layer", False, SIZES),
        ("llama", "norms", False, SIZES),
        ("llava", "dora", True, SIZES),
        ("llava", "full fine-tuning", False, {}),
        ("bart", "dora", False, {}),
        ("bart", "full fine-tuning", True, {}),
        ("qwen3", "dora", False, SIZES),
        ("gemma", "dora", False, SIZES),
    ],
)
def test_in_half_precision_errors_are_those_of_rounding(family, adapter, checkpointing, changes, precision):
    options = ADAPTERS[adapter]
    model = prepare(family, DTYPES[precision], options, checkpointing=checkpointing, **changes)
    exact = losses_and_gradients(copy.deepcopy(model).double())
    fused, plain = with_liger(model), copy.deepcopy(model)
    for kind in zip(losses_and_gradients(fused, precision), losses_and_gradients(plain, precision), exact, strict=True):
        (found, own), (rounded, usual), (expected, right) = kind
        error, usual_error = abs(found - expected) / expected, abs(rounded - expected) / expected
        assert error < 2 * usual_error + 1e-3, (error, usual_error)
        error, usual_error = relative(own, right), relative(usual, right)
        assert error < 1.3 * usual_error + 2e-3, (error, usual_error)


def test_adapters_without_reuse_of_norms_and_kept_outputs_are_not_written_over():
    model = with_liger(prepare("llama", torch.bfloat16, {}, **SIZES))
    seen = []
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(lambda module, inputs, output: seen.append((output, output.clone())))
    inputs, labels, _ = batch(model)
    summed_cross_entropy(model, inputs, labels).backward()
    assert len(seen) == 14 and all(torch.equal(output, before) for output, before in seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_tokens_never_exist(dtype):
    rows, places, vocabulary = 4, 1024, 64_000
    changes = {**SIZES, "vocab_size": vocabulary, "max_position_embeddings": places, "num_hidden_layers": 1}
    model = prepare("llama", dtype, {}, **changes)
    model.set_attn_implementation("sdpa")
    ids = torch.randint(8, vocabulary, (rows, places), device=DEVICE)
    weights = torch.rand(rows, places, device=DEVICE)
    whole = ids.numel() * vocabulary * 4
    peaks = []
    for each in (model, with_liger(model)):
        for weighting in (None, weights):
            for training in (True, False):
                each.train(training)
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                with torch.set_grad_enabled(training):
                    loss = summed_cross_entropy(each, {"input_ids": ids}, ids, weighting)
                    if training:
                        loss.backward()
                peaks.append(torch.cuda.max_memory_allocated() - before)
                each.zero_grad()
                del loss
    assert min(peaks[:4]) >= whole and max(peaks[4:]) < 0.6 * whole, [peak / whole for peak in peaks]


@pytest.mark.parametrize("family", ["llama", "llava", "bart"])
def test_logits_and_texts_of_a_model_in_evaluation_mode_are_what_they_were(family):
    model = prepare(family, torch.bfloat16, {}).eval()
    changed = with_liger(model)
    inputs, labels, _ = batch(model)
    with torch.no_grad():
        assert torch.equal(changed(**inputs).logits, model(**inputs).logits)
        summed_cross_entropy(changed, inputs, labels)
        assert torch.equal(changed(**inputs).logits, model(**inputs).logits)
        given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in inputs}
        texts = [each.generate(**given, max_new_tokens=4, do_sample=False) for each in (changed, model)]
    assert torch.equal(*texts)


RUNS = """
import json, sys
from pathlib import Path
from dora_core.engine.distributed import World
from dora_core.testing.contracts import train_tiny
from dora_core.training.metrics import read_metrics

name, folder = sys.argv[1:]
always = "{stage3_param_persistence_threshold: 0, stage3_max_live_parameters: 0, stage3_max_reuse_distance: 0}"
short = {"train.max_steps": 4, "train.eval_every": 2, "train.save_every": 4, "evaluate.after_training": "false"}
world, losses = World.start(), {}
for run, settings in {
    "plain": {"train.liger": "off"},
    "zero2": {"train.liger": "on"},
    "zero3": {"train.liger": "on", "deepspeed.config": "zero3", "deepspeed.extra": always},
    "checkpointing": {"train.liger": "on", "train.gradient_checkpointing": "true", "deepspeed.config": "zero3"},
}.items():
    found = train_tiny(world, name, folder, run, {**short, **settings})
    rows = read_metrics(Path("runs") / run / "metrics.jsonl")
    losses[run] = found + [row["validation_loss"] for row in rows if "validation_loss" in row]
print("\\n" + json.dumps(losses))
"""


@pytest.mark.parametrize("name", PIPELINES.names())
def test_a_run_with_liger_has_the_losses_of_one_without_under_zero_2_and_3(name, tmp_path):
    PIPELINES.get(name).prepare([str(tmp_path / "data" / "world")])
    done = subprocess.run(
        [sys.executable, "-c", RUNS, name, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cross-entropy" in done.stdout
    losses = json.loads(done.stdout.splitlines()[-1])
    assert len(losses["plain"]) == 6
    for run, found in losses.items():
        assert found == pytest.approx(losses["plain"], rel=1e-3), run
