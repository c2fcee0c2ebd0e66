"""The loss without logits is the loss from logits, whatever the model, its output layer and the labels are."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from families import VOCAB, adapt, batch, gradients, largest_difference, make

from dora_core.adapters import reuse_norms
from dora_core.engine import loss as loss_module
from dora_core.engine.liger import LOGITS_AS_THEY_ARE
from dora_core.engine.loss import LossHead, rows_per_chunk, summed_cross_entropy

FULL = {"kind": "full", "targets": ".*"}
HEADS = {
    "frozen": ({}, {}),
    "trained": (FULL, {}),
    "tied": (FULL, {"tie_word_embeddings": True}),
    "adapted": ({"targets": ["q_proj", "lm_head"]}, {"tie_word_embeddings": False}),
}


def plainly(hidden, weight, bias, labels, weights):
    """Stand in for a fused loss."""
    losses = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="none")
    return (losses if weights is None else losses * weights).sum()


def loss_and_gradients(model, *, weighted: bool):
    inputs, labels, weights = batch(model)
    torch.manual_seed(3)
    loss = summed_cross_entropy(model, inputs, labels, weights if weighted else None)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    return loss.item(), gradients(model)


def check(model, linear_loss, *, weighted: bool):
    expected, plain = loss_and_gradients(model, weighted=weighted)
    model.loss_head = LossHead(model, linear_loss)
    found, own = loss_and_gradients(model, weighted=weighted)
    assert found == pytest.approx(expected, rel=1e-6)
    assert largest_difference(own, plain) < 2e-5


@pytest.mark.parametrize("linear_loss", [plainly, None], ids=["linear", "chunks"])
@pytest.mark.parametrize("family", LOGITS_AS_THEY_ARE)
def test_every_type_of_model_has_the_loss_of_its_logits(family, linear_loss):
    for weighted in (False, True):
        check(adapt(make(family)), linear_loss, weighted=weighted)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("linear_loss", [plainly, None], ids=["linear", "chunks"])
@pytest.mark.parametrize("family", ["llama", "llava"])
def test_every_output_layer_gets_its_gradient(family, head, linear_loss):
    options, changes = HEADS[head]
    model = adapt(make(family, **changes), **options)
    assert any("lm_head" in n for n, p in model.named_parameters() if p.requires_grad) == (
        head in ("trained", "adapted")
    )  # a tied one has the name of the embedding
    check(model, linear_loss, weighted=True)


def test_only_the_output_layer_may_be_trained():
    model = make("llama").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    check(model, None, weighted=False)


def test_dropout_is_the_same_when_logits_are_made_again(monkeypatch):
    monkeypatch.setattr(loss_module, "rows_per_chunk", lambda num_rows, vocabulary: num_rows)
    model = adapt(make("llama", tie_word_embeddings=False), targets=["lm_head"], dropout=0.5)
    inputs, labels, _ = batch(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[labels != -100]
    torch.manual_seed(5)
    expected = F.cross_entropy(model.lm_head(hidden), labels[labels != -100], reduction="sum")
    model.loss_head = LossHead(model)
    torch.manual_seed(5)
    found = summed_cross_entropy(model, inputs, labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    pairs = zip(*(torch.autograd.grad(each, parameters) for each in (found, expected)), strict=True)
    assert all(torch.allclose(own, exact, rtol=1e-4, atol=1e-5) for own, exact in pairs)


@pytest.mark.parametrize("linear_loss", [plainly, None], ids=["linear", "chunks"])
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_batch_without_labels_has_a_loss_and_gradients_of_zero(family, linear_loss):
    model = adapt(make(family), **FULL)
    model.loss_head = LossHead(model, linear_loss)
    inputs, labels, weights = batch(model)
    loss = summed_cross_entropy(model, inputs, torch.full_like(labels, -100), weights)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "llava", "bart"])
def test_who_asks_for_logits_gets_them_before_and_after_a_loss(family):
    model = make(family)
    inputs, labels, _ = batch(model)
    expected = model(**inputs).logits
    model.loss_head = LossHead(model, plainly)
    assert torch.equal(model(**inputs).logits, expected)
    with torch.no_grad():
        summed_cross_entropy(model, inputs, labels)
    assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(TypeError):
        summed_cross_entropy(model, {**inputs, "input_ids": "no tensor"}, labels)
    assert torch.equal(model(**inputs).logits, expected)


def test_a_copy_of_a_model_computes_with_its_own_weights():
    model = make("bart")
    model.loss_head = LossHead(model, plainly)
    other = copy.deepcopy(model)
    inputs, labels, _ = batch(model)
    before = summed_cross_entropy(model, inputs, labels).item()
    with torch.no_grad():
        other.lm_head.weight.zero_()
        other.final_logits_bias.zero_()
    num_targets = int((labels != -100).sum())
    assert summed_cross_entropy(other, inputs, labels).item() == pytest.approx(
        num_targets * torch.tensor(float(VOCAB)).log().item(), rel=1e-5
    )
    assert summed_cross_entropy(model, inputs, labels).item() == before


def test_a_chunk_has_a_quarter_of_the_rows_or_less():
    assert rows_per_chunk(4096, 32000) == 1024
    assert rows_per_chunk(100_000, 128_256) == (1 << 26) // 128_256
    assert [rows_per_chunk(number, 10) for number in (0, 1, 4, 5)] == [1, 1, 1, 2]


class Sizes(TorchDispatchMode):
    """Note the number of elements of every fp32 tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32:
                self.largest = max(self.largest, each.numel())
        return found


def test_logits_of_all_tokens_never_exist():
    model = adapt(make("llama", vocab_size=4000, tie_word_embeddings=False), targets=["lm_head"], rank=1, alpha=1)
    inputs, labels, _ = batch(model)
    inputs = {name: tensor.repeat(4, 1) for name, tensor in inputs.items()}
    labels = labels.repeat(4, 1)
    num_targets = int((labels != -100).sum())
    largest = []
    for head in (None, LossHead(model)):
        model.loss_head = head
        with reuse_norms(model):
            model.lm_head(torch.zeros(1, model.config.hidden_size))  # computes the norm
            with Sizes() as sizes:
                summed_cross_entropy(model, inputs, labels).backward()
        largest.append(sizes.largest)
    assert largest[0] >= labels.numel() * 4000
    assert largest[1] <= max(num_targets * 4000 // 3, 4000 * model.config.hidden_size)
