"""Load a causal language model and its tokenizer, ready for training or for scoring."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dora_core.config import ConfigError
from dora_core.engine import pretrained
from dora_core.engine.build import DTYPES, Engine
from dora_core.engine.loss import summed_cross_entropy
from pipelines.llm.config import ModelSection


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Return the fast tokenizer of ``section``, able to pad; see ``dora_core.engine.pretrained``."""
    return pretrained.load_tokenizer(section.tokenizer or section.path)


def load_model(section: ModelSection, precision: str) -> PreTrainedModel:
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
        raise ConfigError(pretrained.not_found("model", section.path, error)) from None
    return model.train()


def next_token_loss(engine: Engine, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy in fp32 *summed* over the labels that are not -100, each predicted one token before.

    ``batch`` holds ``input_ids`` and ``labels`` [B, S], padded on the right, and ``position_ids`` [B, S] of packs; an
    ``attention_mask`` is not used.
    """
    # No token comes after padding, so the causal mask is enough, under which attention is fastest.
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "attention_mask")}
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    # The cache is off: without it and without a mask, transformers confines attention to where position_ids restart.
    return summed_cross_entropy(engine, inputs, labels)
