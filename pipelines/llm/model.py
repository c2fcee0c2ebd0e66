"""Load a causal language model and its tokenizer, ready for training or for scoring."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dora_core.config import ConfigError
from dora_core.engine.build import DTYPES, Engine
from pipelines.llm.config import ModelSection


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Return the fast tokenizer; a missing pad token becomes one that cannot occur in a row, never the end token.

    Padding is masked in attention and in the loss, so which token pads does not matter to the model; padding with the
    end token would, in code that masks by value. LLaMA and LLaMA-2 pad with <unk> (0), as the paper's code; LLaMA-3
    with its reserved <|finetune_right_pad_id|> or first reserved token.
    """
    name = section.tokenizer or section.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(_not_found("tokenizer", name, error)) from None
    if not tokenizer.is_fast:
        raise ConfigError(
            f"The tokenizer of {name!r} has no fast version, which finding answer tokens needs. Convert it first."
        )
    if tokenizer.pad_token_id is None:
        known = tokenizer.get_vocab()
        candidates = (
            "<|finetune_right_pad_id|>",
            "<|reserved_special_token_0|>",
            "<pad>",
            "[PAD]",
            tokenizer.unk_token,
        )
        pad = next((token for token in candidates if token in known), None)
        if pad is None or known[pad] == tokenizer.eos_token_id:
            raise ConfigError(
                f"The tokenizer of {name!r} has no pad token, and none of its tokens is free for padding. Add one: "
                "load it, set tokenizer.pad_token to an unused token, save it, and give its folder as model.tokenizer."
            )
        tokenizer.pad_token = pad
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"The tokenizer of {name!r} has no end token, so answers would never end. Set tokenizer.eos_token."
        )
    return tokenizer


def load_model(section: ModelSection, precision: str, *, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """Return the model in training mode, its weights in ``precision``; call it within ``Zero.sharded_loading``."""
    dtype = DTYPES[precision]
    try:
        if section.from_scratch:
            config = AutoConfig.from_pretrained(section.path)
            with torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else nullcontext():
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=section.attention)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                section.path, dtype=dtype, attn_implementation=section.attention
            )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(_not_found("model", section.path, error)) from None
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def next_token_loss(engine: Engine, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy in fp32 *summed* over the labels that are not -100, each predicted one token before.

    ``batch`` holds ``input_ids`` and ``labels`` [B, S] and either ``attention_mask`` or ``position_ids`` [B, S].
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    # Without a cache and without a mask, transformers confines attention to where position_ids restart.
    logits = engine(**inputs, use_cache=False).logits
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def _not_found(what: str, name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    kind = "folder" if Path(name).exists() else "name, and no folder of that path exists"
    return (
        f"The {what} {name!r} ({kind}) cannot be loaded: {first} Give the folder of a model that transformers saved, "
        "or a Hugging Face name that this machine can reach or has cached."
    )
