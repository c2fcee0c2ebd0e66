"""A loss without logits trains under ZeRO as the loss from logits does, whatever the output layer is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cases import BATCH, LENGTH, VOCAB, make_engine
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from dora_core.adapters import reuse_norms
from dora_core.engine.loss import LossHead, summed_cross_entropy
from dora_core.testing.ranks import run_on_ranks

STEPS = 3
LAYERS = {
    "frozen": {},
    "trained": {"kind": "full", "targets": ".*"},
    "adapted": {"targets": ["q_proj", "down_proj", "lm_head"]},
}


class Fused(torch.autograd.Function):
    """As Liger: the forward pass leaves the gradients ready, and the weight is not looked at again."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, weights):
        given = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        with torch.enable_grad():
            losses = F.cross_entropy(given[0] @ given[1].t(), labels, reduction="none")
            loss = (losses if weights is None else losses * weights).sum()
            grads = torch.autograd.grad(loss, given)
        ctx.save_for_backward(grads[0], grads[1] if ctx.needs_input_grad[1] else None)
        return loss.detach()

    @staticmethod
    def backward(ctx, grad):
        return *(None if each is None else each * grad for each in ctx.saved_tensors), None, None


def fused(hidden, weight, bias, labels, weights):
    assert weight.shape == (VOCAB, hidden.shape[1]) and bias is None
    return Fused.apply(hidden, weight, labels, weights)


def losses_of(world, folder, stage, layer, head):
    """Train and return losses; on one rank of two no row has a label in the second step."""
    engine = make_engine(world, folder, {"stage": stage, "adapter": LAYERS[layer], "checkpointing": True})
    if head != "logits":
        engine.module.loss_head = LossHead(engine.module, fused if head == "fused" else None)
    losses = []
    with reuse_norms(engine.module):
        for step in range(STEPS):
            engine.begin_step(step, 20)
            generator = torch.Generator().manual_seed(step)
            rows, labels = (torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator) for _ in range(2))
            weights = torch.rand(BATCH, LENGTH, generator=generator)
            labels[:, :3] = -100
            if step == 1:
                labels[: BATCH // 2] = -100
            own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
            loss = summed_cross_entropy(engine, {"input_ids": rows[own]}, labels[own], weights[own])
            engine.backward(loss, BATCH)
            assert engine.end_step()[1]
            with engine.evaluating(), torch.no_grad():
                held = summed_cross_entropy(engine, {"input_ids": rows[own]}, labels[own])
                logits = engine.module(input_ids=rows[:1], use_cache=False).logits
            assert logits.shape == (1, LENGTH, VOCAB)
            losses.append(world.sum([loss.item(), held.item()]))
    return losses


@pytest.mark.parametrize("layer", ["frozen", "trained", "adapted", "tied and frozen", "tied and trained"])
def test_training_without_logits_is_training_with_them(model_folder, tmp_path, layer):
    tied, layer = layer.startswith("tied"), layer.rsplit(" ", 1)[-1]
    folder = model_folder
    if tied:
        folder = tmp_path
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(model_folder, tie_word_embeddings=True))
        model.save_pretrained(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = run_on_ranks(losses_of, 2, folder, 0, layer, "logits")[0]
    for stage in (0, 2, 3):
        for head in ("fused", "chunks"):
            found = run_on_ranks(losses_of, 2, folder, stage, layer, head)[0]
            for own, plain in zip(found, expected, strict=True):
                assert own == pytest.approx(plain, rel=1e-5), (stage, head)
