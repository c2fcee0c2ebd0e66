"""Training under ZeRO is training: the same losses in every stage, on one rank and on two."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cases import BATCH, LENGTH, VOCAB, make_engine, num_norms, train_steps
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from dora_core.adapters import AdapterConfig, apply_adapters
from dora_core.testing.ranks import run_on_ranks

STEPS = 5
CASES = [
    {"stage": stage, "accumulation": accumulation, "checkpointing": checkpointing}
    for stage, accumulation, checkpointing in (
        (0, 1, False),
        (0, 4, True),
        (1, 2, False),
        (2, 4, True),
        (3, 1, True),
        (3, 4, False),
    )
]


def losses_of(world, folder, cases):
    return [train_steps(make_engine(world, folder, case), 0, STEPS) for case in cases]


def plain_losses(folder, adapter=None):
    """Train with nothing but torch: no DeepSpeed, no reuse, no accumulation."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = AdapterConfig(
        **{"kind": "dora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj"], **(adapter or {})}
    )
    apply_adapters(model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 20)
        rows = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
        logits = model(input_ids=rows).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_every_stage_and_split_on_two_ranks_has_the_losses_of_plain_torch(model_folder):
    expected = plain_losses(model_folder)
    assert expected[-1] != expected[0]
    for case, losses in zip(CASES, run_on_ranks(losses_of, 2, model_folder, CASES)[0], strict=True):
        assert losses == pytest.approx(expected, abs=1e-5), case


def num_reductions(world, folder, stage):
    """Train a step; return how often DeepSpeed was asked to reduce gradients over ranks."""
    engine = make_engine(world, folder, {"stage": stage})
    asked, reduce = [], engine.deepspeed.allreduce_gradients
    engine.deepspeed.allreduce_gradients = lambda *args, **kwargs: (asked.append(1), reduce(*args, **kwargs))
    train_steps(engine, 0, 1)
    return len(asked)


@pytest.mark.parametrize(("world_size", "stage", "expected"), [(1, 0, 0), (2, 0, 1), (1, 2, 1)])
def test_one_rank_without_zero_reduces_nothing(model_folder, world_size, stage, expected):
    assert run_on_ranks(num_reductions, world_size, model_folder, stage) == [expected] * world_size


def test_every_stage_on_one_rank_has_the_losses_of_plain_torch(model_folder):
    expected = plain_losses(model_folder)
    for case, losses in zip(CASES, run_on_ranks(losses_of, 1, model_folder, CASES)[0], strict=True):
        assert losses == pytest.approx(expected, abs=1e-5), case


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "lora"},
        {"norm_gradient": "full"},
        {"magnitude_targets": ["o_proj", "gate_proj"], "trainable": ["norm"]},
        {"kind": "full", "targets": ".*"},
    ],
    ids=["lora", "full norm gradient", "magnitude only and extras", "full fine-tuning"],
)
def test_every_kind_under_zero_3_has_the_losses_of_plain_torch(model_folder, adapter):
    cases = [{"stage": stage, "adapter": adapter} for stage in (2, 3)]
    for losses in run_on_ranks(losses_of, 2, model_folder, cases)[0]:
        assert losses == pytest.approx(plain_losses(model_folder, adapter), abs=1e-5)


@pytest.mark.parametrize(("norm_gradient", "rank"), [("detached", 4), ("full", 16)])  # the second is dense
def test_fused_kernels_under_zero_have_the_losses_of_plain_torch_and_one_norm_a_step(model_folder, norm_gradient, rank):
    adapter = {"targets": ["q_proj", "k_proj", "v_proj", "down_proj"], "norm_gradient": norm_gradient, "rank": rank}
    fused = {**adapter, "kernel": "auto" if torch.cuda.is_available() else "fused", "kept_outputs": ["down_proj"]}
    cases = [{"stage": stage, "accumulation": 2, "checkpointing": stage != 2, "adapter": fused} for stage in (0, 2, 3)]
    expected = plain_losses(model_folder, adapter)
    for case, (losses, counts) in zip(cases, run_on_ranks(losses_and_norms, 2, model_folder, cases)[0], strict=True):
        assert losses == pytest.approx(expected, abs=1e-5), case
        assert counts == [STEPS] * 8, case


def losses_and_norms(world, folder, cases):
    results = []
    for case in cases:
        engine = make_engine(world, folder, case)
        losses = train_steps(engine, 0, STEPS)
        results.append((losses, num_norms(engine)))
    return results


def test_bf16_and_fp16_agree_between_stages_and_stay_near_fp32(model_folder):
    cases = [{"stage": stage, "precision": precision} for precision in ("bf16", "fp16") for stage in (0, 1, 2, 3)]
    cases += [{"stage": stage, "precision": "bf16", "adapter": {"kind": "full", "targets": ".*"}} for stage in (2, 3)]
    results = run_on_ranks(losses_of_half, 2, model_folder, cases)[0]
    fp32 = plain_losses(model_folder)
    for case, losses in zip(cases[:8], results[:8], strict=True):
        assert losses == pytest.approx(fp32, abs=0.02), case
        assert losses == pytest.approx(results[0 if case["precision"] == "bf16" else 4], abs=1e-3), case
    assert results[8] == pytest.approx(results[9], abs=5e-3)  # all weights rounded to bf16 at every step


def losses_of_half(world, folder, cases):
    from dora_core.engine.optim import LossScale

    results = []
    for case in cases:
        engine = make_engine(world, folder, case)
        if case["precision"] == "fp16":
            engine.loss_scale = LossScale(64.0)  # the usual first scale overflows and would skip a step
        assert {p.dtype for p in engine.module.parameters() if p.requires_grad} == {torch.float32}
        results.append(train_steps(engine, 0, STEPS))
    return results


def test_fp16_skips_a_step_that_overflows_on_all_ranks_and_halves_the_scale(model_folder):
    for stage in (0, 2):
        for before, after in run_on_ranks(overflow, 2, model_folder, {"stage": stage, "precision": "fp16"}):
            assert before == (False, 2.0**126 / 2)
            assert after[0] is True


def overflow(world, folder, case):
    engine = make_engine(world, folder, case)
    engine.loss_scale.value = 2.0**126
    results = []
    for step in (0, 1):
        engine.begin_step(step, 20)
        rows = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(world.rank))
        engine.backward(engine(input_ids=rows, use_cache=False).logits.float().square().sum(), 1.0)
        _, applied = engine.end_step()
        results.append((applied, engine.loss_scale.value))
        engine.loss_scale.value = 1.0
    return results


def test_the_norm_is_computed_once_per_step_and_layer_in_every_stage(model_folder):
    cases = [{"stage": stage, "accumulation": 2, "checkpointing": True} for stage in (0, 1, 2, 3)]
    for counts in run_on_ranks(norm_counts, 2, model_folder, cases)[0]:
        assert counts == [STEPS] * 6


def norm_counts(world, folder, cases):
    counts = []
    for case in cases:
        engine = make_engine(world, folder, case)
        before = num_norms(engine)
        train_steps(engine, 0, STEPS)
        counts.append([now - then for now, then in zip(num_norms(engine), before, strict=True)])
    return counts


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_twenty_accumulated_steps_with_and_without_reuse_are_the_same_bits(model_folder, stage):
    with_reuse, without = run_on_ranks(reuse_and_not, 2, model_folder, {"stage": stage, "accumulation": 2})[0]
    assert with_reuse == without


def reuse_and_not(world, folder, case):
    return [train_steps(make_engine(world, folder, case), 0, 20, reuse=reuse) for reuse in (True, False)]
