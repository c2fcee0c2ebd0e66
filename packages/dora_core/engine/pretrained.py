"""Tokenizers from a folder or hub name, and what to say when something cannot be loaded from there."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dora_core.config import ConfigError

# LLaMA and LLaMA-2 pad with <unk> (0), as the paper's code; LLaMA-3 with its own or its first reserved token.
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<pad>", "[PAD]")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the fast tokenizer; a missing pad token becomes one that cannot occur in a row, never the end token.

    Padding is masked in attention and in the loss, so which token pads does not matter to the model; padding with the
    end token would, in code that masks by value. Raises ``ConfigError`` for a tokenizer that cannot be loaded, is not
    fast, has no end token, or has nothing to pad with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(not_found("tokenizer", name, error)) from None
    if not tokenizer.is_fast:
        raise ConfigError(
            f"The tokenizer of {name!r} has no fast version, which finding answer tokens needs. Convert it first."
        )
    if tokenizer.pad_token_id is None:
        known = tokenizer.get_vocab()
        pad = next((token for token in (*_PAD_TOKENS, tokenizer.unk_token) if token in known), None)
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


def not_found(what: str, name: str, error: Exception) -> str:
    """Return the message for a model, tokenizer or part of one that cannot be loaded from ``name``."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    path = Path(name)
    kind = "folder" if path.is_dir() else "file" if path.is_file() else "name, and no folder of that path exists"
    return (
        f"The {what} {name!r} ({kind}) cannot be loaded: {first} Give the folder of a {what} that transformers saved, "
        "or a Hugging Face name that this machine can reach or has cached."
    )
