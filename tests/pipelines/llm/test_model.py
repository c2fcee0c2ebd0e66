"""Models and tokenizers of the families that the recipes name, tiny and random, through the real loading code."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from dora_core.adapters import AdapterConfig, apply_adapters
from dora_core.config import ConfigError, load_config
from dora_core.data.collate import TokenRow, pad_rows
from dora_core.testing.tiny import LLAMA_3_ROPE
from pipelines.llm.config import RECIPES, LLMConfig, ModelSection
from pipelines.llm.model import load_model, load_tokenizer, next_token_loss

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama-3": LlamaConfig(**SIZES, rope_parameters=LLAMA_3_ROPE),
    "qwen2": Qwen2Config(**SIZES),  # q, k and v have a bias
    "qwen3": Qwen3Config(**SIZES),
}


def save_tokenizer(folder, special: dict[str, str], extra: tuple[str, ...] = ()) -> None:
    words = ["<unk>", "a", "b", "c", *special.values(), *extra]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(dict.fromkeys(words))}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_family_loads_adapts_and_has_the_models_own_loss(tmp_path, family, precision, attention_masks):
    FAMILIES[family].save_pretrained(tmp_path)
    model = load_model(ModelSection(path=str(tmp_path), from_scratch=True), precision)
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32 if precision == "fp32" else torch.bfloat16}
    rows = [TokenRow([1, 5, 9, 13, 2], [-100, -100, 9, 13, 2]), TokenRow([1, 7, 2], [1, 7, 2])]
    batch = pad_rows(rows, pad_id=0)
    own = model(**batch, use_cache=False).loss * 5  # the mean over the five labels
    report = apply_adapters(model, AdapterConfig(rank=4, alpha=8))
    assert len(report.modules) == 2 * 5
    attention_masks.clear()
    loss = next_token_loss(model, batch)
    assert attention_masks == [None, None]  # of two layers
    assert loss.item() == pytest.approx(own.item(), rel=1e-6 if precision == "fp32" else 1e-2)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_saved_model_comes_back_with_its_weights(tmp_path):
    torch.manual_seed(0)
    section = ModelSection(path=str(tmp_path))
    FAMILIES["llama"].save_pretrained(tmp_path)
    first = load_model(ModelSection(path=str(tmp_path), from_scratch=True), "fp32")
    first.save_pretrained(tmp_path)
    second = load_model(section, "fp32")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("special", "extra", "pad"),
    [
        ({"unk_token": "<unk>", "eos_token": "</s>"}, (), "<unk>"),  # LLaMA and LLaMA-2: 0, as the paper's code
        ({"eos_token": "<|end_of_text|>"}, ("<|finetune_right_pad_id|>",), "<|finetune_right_pad_id|>"),  # LLaMA-3.1
        (
            {"eos_token": "<|end_of_text|>"},
            ("<|reserved_special_token_0|>",),
            "<|reserved_special_token_0|>",
        ),  # LLaMA-3
        ({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, (), "<|endoftext|>"),  # Qwen has its own
    ],
)
def test_a_missing_pad_token_is_chosen_and_never_the_end_token(tmp_path, special, extra, pad):
    save_tokenizer(tmp_path, special, extra)
    tokenizer = load_tokenizer(ModelSection(path=str(tmp_path)))
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_tokenizer_that_cannot_pad_or_end_is_refused(tmp_path):
    save_tokenizer(tmp_path / "pad", {"eos_token": "</s>"})
    with pytest.raises(ConfigError, match="has no pad token, and none of its tokens is free"):
        load_tokenizer(ModelSection(path=str(tmp_path / "pad")))
    save_tokenizer(tmp_path / "end", {"unk_token": "<unk>"})
    with pytest.raises(ConfigError, match="has no end token"):
        load_tokenizer(ModelSection(path=str(tmp_path / "end")))


def test_a_model_that_is_not_there_is_refused_with_what_to_give(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load in (lambda s: load_model(s, "fp32"), load_tokenizer):
        with pytest.raises(ConfigError, match=r"cannot be loaded.*Give the folder of a (model|tokenizer)"):
            load(ModelSection(path=str(tmp_path / "nothing")))


def test_every_recipe_adapts_a_llama():
    recipes = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert len(recipes) > 10
    for recipe in recipes:
        adapter = load_config(LLMConfig, recipe, [], recipes=RECIPES).adapter
        with torch.device("meta"):
            model = LlamaForCausalLM(FAMILIES["llama"])
            report = apply_adapters(model, adapter)
        assert report.num_trainable, recipe
