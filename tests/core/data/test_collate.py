"""Padded and packed batches hold the same rows, give the same loss, and keep rows apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from dora_core.data.collate import (
    IGNORED,
    TokenRow,
    flatten_packs,
    make_packs,
    num_targets,
    num_tokens,
    pad_packs,
    pad_rows,
)

PAD = 0


def row(*ids, masked=0):
    return TokenRow(list(ids), [IGNORED] * masked + list(ids[masked:]))


def random_rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(1, 64, (length,), generator=generator).tolist() for length in lengths]
    return [row(*ids, masked=index % 3 if len(ids) > 3 else 0) for index, ids in enumerate(made)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attn_implementation="sdpa",
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).float().eval()


def summed_loss(model, batch):
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    targets = batch["labels"][:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), targets, ignore_index=IGNORED, reduction="sum"
    )


def test_padding_on_the_right_and_on_the_left():
    rows = [row(5, 6, 7, masked=1), row(8)]
    right, left = (pad_rows(rows, PAD, side=side, multiple_of=4) for side in ("right", "left"))
    assert right["input_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert right["labels"].tolist() == [[-100, 6, 7, -100], [-100, -100, -100, -100]]
    assert left["input_ids"].tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]]
    assert left["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert left["labels"].tolist() == [[-100, -100, 6, 7], [-100, -100, -100, -100]]
    with pytest.raises(ValueError, match="side is 'middle'"):
        pad_rows(rows, PAD, side="middle")


def test_a_pad_token_that_is_also_the_end_token_keeps_its_label():
    batch = pad_rows([row(5, 2)], pad_id=2, multiple_of=4)
    assert batch["labels"].tolist() == [[-100, 2, -100, -100]]


def pack_rows(rows, pad_id, pack_length):
    return pad_packs(make_packs(rows, pack_length), pad_id)


def test_packing_is_first_fit_decreasing_and_restarts_positions():
    rows = [row(1, 2), row(3, 4, 5, 6, 7), row(8, 9, 10), row(11, 12, 13, masked=2)]
    batch = pack_rows(rows, PAD, pack_length=8)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 1, 2, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 4, 5, 6, 7, -100, 9, 10], [-100, -100, 13, -100, 2, -100, -100, -100]]
    assert "attention_mask" not in batch


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_packs_hold_every_token_and_target_of_the_rows(lengths):
    rows = random_rows(lengths)
    packed, padded = pack_rows(rows, PAD, pack_length=37), pad_rows(rows, PAD)
    assert packed["input_ids"].shape[1] <= 40
    assert num_tokens(packed, PAD) == num_tokens(padded, PAD) == sum(lengths)
    assert packed["input_ids"].ne(PAD).sum() == sum(lengths)
    assert num_targets(packed) == num_targets(padded) == num_targets(flatten_packs(packed))
    # first fit leaves at most one pack half empty
    assert packed["input_ids"].shape[0] <= 2 * sum(lengths) / 37 + 1


def test_a_seed_draws_other_packs_of_the_same_rows():
    rows = random_rows([5, 9, 3, 7] * 200)
    packs = [make_packs(rows, 32, seed) for seed in (0, 0, 1)]
    assert packs[0] == packs[1] != packs[2]
    for pack in packs:
        flat = [row.input_ids for rows_of_pack in pack for row in rows_of_pack]
        assert sorted(flat) == sorted(row.input_ids for row in rows)
        assert len(pack) <= 1.15 * sum(map(len, flat)) / 32


def test_a_row_longer_than_a_pack_is_an_error():
    with pytest.raises(
        ValueError, match=r"length is 9; it must be at most pack_length \(8\)\. Raise data\.pack_length"
    ):
        pack_rows([row(*range(1, 10))], PAD, pack_length=8)


def test_packed_rows_have_the_loss_of_padded_rows(model):
    rows = random_rows([3, 17, 1, 9, 30, 2, 22, 8])
    batches = [pad_rows(rows, PAD), pad_rows(rows, PAD, side="left"), pack_rows(rows, PAD, 48)]
    batches.append(flatten_packs(batches[-1]))
    assert batches[-2]["input_ids"].shape[0] > 1
    alone = sum(summed_loss(model, pad_rows([one], PAD, multiple_of=1)) for one in rows)
    for batch in batches:
        assert num_targets(batch) == num_targets(batches[0])
        assert summed_loss(model, batch) == pytest.approx(alone.item(), rel=1e-5)


def test_one_rows_tokens_do_not_reach_another_rows_logits(model):
    first, second, third = random_rows([6, 6, 6])
    other = row(*[63 - token for token in first.input_ids])

    def logits(rows):
        batch = pack_rows(rows, PAD, 32)
        with torch.no_grad():
            return model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]

    before, after = logits([first, second, third]), logits([other, second, third])
    assert not torch.allclose(before[:6], after[:6], atol=1e-3)
    assert torch.equal(before[6:], after[6:])


@pytest.mark.parametrize("make", [lambda rows: pad_rows(rows, PAD), lambda rows: pack_rows(rows, PAD, 32)])
def test_a_micro_batch_without_rows_runs_and_counts_nothing(model, make):
    batch = make([])
    assert batch.keys() == make([row(1, 2)]).keys()
    assert num_targets(batch) == 0
    model.zero_grad()
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    (logits.sum() * 0).backward()
    assert torch.isfinite(logits).all()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_row_needs_one_label_per_token():
    with pytest.raises(ValueError, match="2 tokens and 1 labels"):
        TokenRow([1, 2], [1])
    with pytest.raises(ValueError, match="at least one token"):
        TokenRow([], [])
