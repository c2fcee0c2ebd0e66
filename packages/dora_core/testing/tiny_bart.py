"""A tiny random BART and its tokenizer, saved as transformers saves them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import processors
from transformers import BartConfig, BartForConditionalGeneration

from dora_core.testing.tiny import SPECIAL_TOKENS, train_tokenizer


def save_tiny_bart(
    folder: str | Path,
    texts: Iterable[str],
    *,
    vocab_size: int = 1024,
    phrases: Sequence[str] = (),
    hidden: int = 96,
    layers: int = 2,
    heads: int = 4,
    seed: int = 0,
    init_std: float = 0.05,
    extra_tokens: Sequence[str] = (),
    extra_std: float = 1.0,
) -> BartForConditionalGeneration:
    """Save and return a BART whose fp32 weights depend on the seed alone; the global generator is left as it was.

    The tokenizer is trained on ``texts``, takes each of ``phrases`` as one token, and puts ``<s>`` and ``</s>`` around
    every text, as BART's does. Encoder and decoder have ``layers`` layers each. The vectors of ``extra_tokens`` are
    drawn ``extra_std`` wide: as narrow as words, they would take a tiny model long to tell apart beside features.
    """
    tokenizer = train_tokenizer(texts, vocab_size, folder, phrases)
    ids = {token: SPECIAL_TOKENS.index(token) for token in SPECIAL_TOKENS}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[(each, ids[each]) for each in ("<s>", "</s>")]
    )
    tokenizer.add_tokens(list(extra_tokens), special_tokens=True)
    tokenizer.save_pretrained(folder)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=hidden,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=3 * hidden,
        decoder_ffn_dim=3 * hidden,
        max_position_embeddings=256,
        dropout=0.0,
        init_std=init_std,
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
        decoder_start_token_id=ids["</s>"],
        forced_eos_token_id=ids["</s>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BartForConditionalGeneration(config)
        if extra_tokens:
            torch.nn.init.normal_(model.model.shared.weight.data[-len(extra_tokens) :], std=extra_std)
    model.save_pretrained(folder)
    return model
