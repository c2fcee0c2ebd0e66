"""Load a VL-BART from a BART, say how it learns, and compute its loss."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import BartConfig, PreTrainedConfig, PreTrainedTokenizerBase

from dora_core.adapters.sharded import gathered
from dora_core.config import ConfigError, require
from dora_core.data.collate import WIDTH_MULTIPLE
from dora_core.engine import pretrained
from dora_core.engine.build import DTYPES, Engine
from dora_core.engine.loss import summed_cross_entropy
from dora_core.engine.zero import Zero
from pipelines.video.config import ModelSection, VideoConfig
from pipelines.video.encode import EXTRA_TOKENS, NUM_VISUAL_TOKENS, TextEncoder, add_extra_tokens
from pipelines.video.vl_bart import VLBart

_SEED = 9595
"""Of weights that no file has. Those that are not trained are not saved either, so it is one for all runs."""


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Return the fast tokenizer with the extra tokens of VL-BART; raises ``ConfigError``."""
    tokenizer = pretrained.load_tokenizer(section.tokenizer or section.path)
    add_extra_tokens(tokenizer)
    ids = tokenizer("x")["input_ids"]
    require(
        len(ids) > 1 and ids[-1] == tokenizer.eos_token_id,
        "model.tokenizer",
        section.tokenizer or section.path,
        "a tokenizer that ends every text with its end token, as BART's does",
        "Give the tokenizer of a BART.",
    )
    return tokenizer


def text_encoder(cfg: VideoConfig, tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    """Return what makes tokens of a recipe's texts, no more than its BART has positions; raises ``ConfigError``."""
    positions = _bart_config(cfg.model.path).max_position_embeddings
    limit = positions // WIDTH_MULTIPLE * WIDTH_MULTIPLE  # padding takes positions, too
    return TextEncoder(tokenizer, cfg.data.task_prompts, cfg.data.reference_truncation, limit)


def load_vl_bart(
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    visual_dim: int,
    precision: str,
    zero: Zero | None = None,
) -> VLBart:
    """Return the model in training mode, its vocabulary grown to the tokenizer's.

    Weights are in ``precision``; under ZeRO-3 they are partitioned as they are read, and every rank must call it. A
    BART gets a random visual embedding for features of ``visual_dim`` numbers; a VL-BART must have been made for as
    many. Raises ``ConfigError``.
    """
    config = _config(section, visual_dim)
    options = {"dtype": DTYPES[precision], "attn_implementation": section.attention}
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        try:
            with zero.sharded_loading() if zero else nullcontext():
                if section.from_scratch:
                    model = VLBart._from_config(config, **options)
                else:
                    model = VLBart.from_pretrained(section.path, config=config, **options)
                _add_words(model, len(tokenizer))
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(pretrained.not_found("model", section.path, error)) from None
    model.config.first_place_id = tokenizer.convert_tokens_to_ids(EXTRA_TOKENS[NUM_VISUAL_TOKENS])
    return model.train()


def weighted_loss(engine: Engine, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy of the batch's target tokens, in fp32, times their weights, *summed*."""
    names = ("input_ids", "attention_mask", "features", "feature_mask", "num_pictures", "decoder_input_ids")
    return summed_cross_entropy(engine, {name: batch[name] for name in names}, batch["labels"], batch["label_weights"])


def decoder_start(config: BartConfig) -> int:
    """Return the token that every decoder sequence starts with; BART's is its end token."""
    return config.eos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id


def visual_dim_of(path: str) -> int | None:
    """Return the size of features that a saved VL-BART takes; None for a BART. Raises ``ConfigError``."""
    return getattr(_bart_config(path), "visual_dim", None)


def _bart_config(path: str) -> BartConfig:
    try:
        raw = PreTrainedConfig.get_config_dict(path)[0]
        require(
            raw.get("model_type") == "bart",
            "model.path",
            path,
            f"a BART; this one is a {raw.get('model_type')!r}",
            "Give for example facebook/bart-base.",
        )
        return BartConfig.from_dict(raw)
    except OSError as error:
        raise ConfigError(pretrained.not_found("model", path, error)) from None


def _config(section: ModelSection, visual_dim: int) -> BartConfig:
    config = _bart_config(section.path)
    known = getattr(config, "visual_dim", visual_dim)
    require(
        known == visual_dim,
        "The size of features",
        visual_dim,
        f"that which {section.path} was trained with ({known})",
        "Use features of the same encoder, or start from a plain BART.",
    )
    config.visual_dim = visual_dim
    config.first_place_id = getattr(config, "first_place_id", 0)  # set once the tokenizer is known
    return config


def _add_words(model: VLBart, num_tokens: int) -> None:
    """Make room for added tokens, their vectors drawn as BART's are, the same in every run and on every rank."""
    before = model.config.vocab_size
    if num_tokens <= before:
        return
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    weight = model.model.shared.weight
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad(), gathered([weight], modify=True):
        new = torch.randn(num_tokens - before, weight.shape[1], generator=generator) * model.config.init_std
        weight[before:] = new.to(weight.device, weight.dtype)
