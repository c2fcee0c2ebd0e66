"""Tiny random models and the tokenizers that go with them, saved as `save_pretrained` does."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
"""In the order of their ids: 0, 1 and 2 as in LLaMA, and a padding token of its own."""
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
"""LLaMA 3's scaling of rotary frequencies, for texts longer than 128 tokens."""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, path: str | Path, phrases: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the texts and save it in the folder `path`.

    Every text round-trips. A BOS is put first and no EOS last. Each of `phrases` is one token wherever it occurs.
    `vocab_size` is an upper bound of the entries; a value below 260 (the bytes and the special tokens) plus the
    number of phrases raises ValueError.
    """
    smallest = 256 + len(SPECIAL_TOKENS) + len(phrases)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} was given; {smallest} or more is allowed; raise vocab_size")
    unknown, bos, eos, pad = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(phrases),
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    kept_apart = re.compile("|".join(map(re.escape, sorted(phrases, key=len, reverse=True))) or "(?!)")
    tokenizer.train_from_iterator((part for text in texts for part in kept_apart.split(text)), trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in phrases])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.save_pretrained(path)
    return fast


def tiny_llama(
    vocab_size: int,
    hidden: int = 96,
    layers: int = 4,
    heads: int = 4,
    seed: int = 0,
    intermediate: int | None = None,
    tie_embeddings: bool = False,
    max_positions: int = 512,
    init_std: float = 0.05,
) -> LlamaForCausalLM:
    """Build a LLaMA with random fp32 weights that depend on the seed only; the global generator is left as it was."""
    if hidden % heads:
        raise ValueError(f"hidden={hidden}, heads={heads} was given; heads must divide hidden; change one of them")
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate or 3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_positions,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        tie_word_embeddings=tie_embeddings,
        initializer_range=init_std,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_tiny_llama(
    path: str | Path,
    texts: Iterable[str],
    vocab_size: int = 1024,
    hidden: int = 96,
    layers: int = 4,
    heads: int = 4,
    seed: int = 0,
    phrases: Sequence[str] = (),
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Save a tiny LLaMA and a tokenizer trained on the texts in one folder, and return both."""
    tokenizer = train_tokenizer(texts, vocab_size, path, phrases)
    model = tiny_llama(len(tokenizer), hidden, layers, heads, seed)
    model.save_pretrained(path)
    return model, tokenizer
