"""Texts and option scores from a language model, the same for every batch size.

Legend of tensor names: B rows of a batch, S tokens of the longest row, T tokens kept, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig

from dora_core.adapters.merge import evaluation_mode

FILLER_ID = 0  # any token: what stands at a masked place or in a call made for the other ranks' sake is never read
# All but cuDNN, torch's first choice on Hopper GPUs, which prepares itself for every width that it has not seen: with
# each token, where texts are written.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.no_grad()
def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[list[int]],
    *,
    batch_size: int,
    num_beams: int,
    max_new_tokens: int,
    inputs_for: Callable[[list[int]], dict[str, Any]] | None = None,
    num_calls: int | None = None,
    synced: bool = False,
    device: torch.device | None = None,
) -> list[str]:
    """Return the continuation of each prompt, in order, by greedy (``num_beams`` 1) or beam search, never sampling.

    Prompts, texts or token ids, are padded under a mask and never truncated. A continuation ends before the first
    end-of-text token of the tokenizer or of the model's generation config, whose other settings are left aside.
    ``model`` is the model itself, not an engine around it; that of an encoder and a decoder answers with a text of its
    own, for which ``max_new_tokens`` counts all tokens but the decoder's start.

    ``inputs_for`` returns what else the model takes, such as pixels, for the prompts at some places, which may be none.
    It runs one batch ahead in another thread; tensors among it are on the model's device or are moved there.

    Under ZeRO-3 every rank must call this with ``synced`` and the same ``num_calls``: ranks with fewer batches make
    up for them, and each call runs until all ranks are done with it.
    """
    encoded = [_encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    device = device or _device_of(model)
    end_ids = _end_ids(model, tokenizer)
    has_encoder = model.config.is_encoder_decoder
    settings = GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=end_ids or None,
        pad_token_id=end_ids[0] if end_ids else FILLER_ID,
        decoder_start_token_id=_decoder_start(model) if has_encoder else None,
    )
    texts = [""] * len(prompts)
    with evaluation_mode(model), _own_generation_config_only(model), sdpa_kernel(ATTENTION):
        batches = _batches([len(ids) for ids in encoded], batch_size, num_calls)
        for places, others in _one_ahead(batches, inputs_for or (lambda places: {})):
            ids_BS, mask_BS = _pad([encoded[place] for place in places] or [[FILLER_ID]], left=not has_encoder)
            output_BS = model.generate(
                input_ids=ids_BS.to(device),
                attention_mask=mask_BS.to(device),
                **{name: each.to(device) if torch.is_tensor(each) else each for name, each in others.items()},
                generation_config=settings,
                synced_gpus=synced,
            )
            new_ids = output_BS[:, 1 if has_encoder else ids_BS.shape[1] :].tolist()
            for place, ids in zip(places, new_ids, strict=False):  # a call for the other ranks' sake has no places
                text_ids = _until_end(ids, end_ids)
                texts[place] = tokenizer.decode(text_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


@torch.no_grad()
def option_log_likelihoods(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    *,
    batch_size: int,
    num_calls: int | None = None,
    device: torch.device | None = None,
) -> list[list[float]]:
    """Return, per prompt and option, the log-probability (natural, summed over tokens) of the option after the prompt.

    Prompt and option are tokenized as one text; a token counts as the option's if it holds at least one of its
    characters. The softmax is in fp32. A batch is ``batch_size`` pairs of prompt and option. Under ZeRO-3 every rank
    must call this with the same ``num_calls``.
    """
    pairs = [(row, option) for row, choices in enumerate(options) for option in choices]
    encoded = [_encode_option(tokenizer, prompts[row], option) for row, option in pairs]
    device = device or _device_of(model)
    keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    scores = [0.0] * len(pairs)
    with evaluation_mode(model):
        for places in _batches([len(ids) for ids, _ in encoded], batch_size, num_calls):
            batch = [encoded[place] for place in places] or [([FILLER_ID, FILLER_ID], 1)]
            ids_BS, mask_BS = _pad([ids for ids, _ in batch], left=False)
            num_kept = ids_BS.shape[1] - min(start for _, start in batch) + 1
            output = model(
                input_ids=ids_BS.to(device),
                attention_mask=mask_BS.to(device),
                use_cache=False,
                **({"logits_to_keep": num_kept} if keeps_logits else {}),
            )
            logits_BTV = output.logits[:, -num_kept:]
            offset = ids_BS.shape[1] - num_kept + 1  # logits_BTV[:, t] predicts the token at t + offset
            for line, (place, (ids, start)) in enumerate(zip(places, batch, strict=False)):
                logits = logits_BTV[line, start - offset : len(ids) - offset].float()
                targets = torch.tensor(ids[start:], device=logits.device)
                chosen = logits.log_softmax(-1).gather(-1, targets[:, None])
                scores[place] = chosen.sum().item()
    remaining = iter(scores)
    return [[next(remaining) for _ in choices] for choices in options]


def _encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    ids = list(tokenizer(prompt, padding=False, truncation=False, verbose=False)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # a tokenizer may end every text; a prompt goes on
        ids.pop()
    if not ids:
        raise ValueError(
            f"The prompt {prompt!r} has no tokens; a model needs at least one to continue. Choose a template that "
            "shows the question, or a tokenizer that starts texts with a token of its own."
        )
    return ids


def _encode_option(tokenizer: Any, prompt: str, option: str) -> tuple[list[int], int]:
    """Return the tokens of ``prompt + option`` and the place of the option's first token."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token covers; ranking options needs a fast "
            "tokenizer. Convert it (tokenizer.json) or set evaluate.mode to generate."
        )
    encoding = tokenizer(prompt + option, padding=False, truncation=False, return_offsets_mapping=True, verbose=False)
    own = [place for place, (_, end) in enumerate(encoding["offset_mapping"]) if end > len(prompt)]
    if not own or own[0] == 0:
        raise ValueError(
            f"The option {option!r} after the prompt {prompt[-40:]!r} has {len(own)} tokens and {own[0] if own else 0} "
            "before them; at least one of each is needed. Give options text, and a template that shows the question."
        )
    return list(encoding["input_ids"][: own[-1] + 1]), own[0]


def _batches(lengths: list[int], batch_size: int, num_calls: int | None) -> Iterator[list[int]]:
    """Yield places in batches, longest first, so that memory runs out at once or never; then empty batches."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if num_calls is not None and num_calls < len(batches):
        raise ValueError(
            f"num_calls is {num_calls} but {len(lengths)} texts in batches of {batch_size} take {len(batches)}; it "
            "must be at least that on every rank. Pass the largest number of batches over the ranks."
        )
    yield from batches
    yield from ([] for _ in range((num_calls or 0) - len(batches)))


def _one_ahead(
    batches: Iterable[list[int]], inputs_for: Callable[[list[int]], dict[str, Any]]
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield each batch with its inputs, which are made while the batch before is being worked on."""
    with ThreadPoolExecutor(1) as worker:
        waiting = None
        for places in batches:
            upcoming = (places, worker.submit(inputs_for, places))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = upcoming
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _pad(rows: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, int64 ``[B, S]``, of rows padded on one side."""
    longest = max(map(len, rows))
    ids_BS = torch.full((len(rows), longest), FILLER_ID, dtype=torch.int64)
    mask_BS = torch.zeros_like(ids_BS)
    for line, ids in enumerate(rows):
        span = slice(longest - len(ids), longest) if left else slice(0, len(ids))
        ids_BS[line, span] = torch.tensor(ids)
        mask_BS[line, span] = 1
    return ids_BS, mask_BS


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a text: the tokenizer's, then those of the model's generation config."""
    listed = model.generation_config.eos_token_id
    candidates = [tokenizer.eos_token_id, *(listed if isinstance(listed, list | tuple) else [listed])]
    return list(dict.fromkeys(candidate for candidate in candidates if candidate is not None))


def _decoder_start(model: Any) -> int | None:
    """Return what a decoder's texts start with, which is no part of them, even if it is the end token, as BART's."""
    listed = (getattr(each, "decoder_start_token_id", None) for each in (model.config, model.generation_config))
    return next((start for start in listed if start is not None), model.config.eos_token_id)


def _until_end(ids: list[int], end_ids: list[int]) -> list[int]:
    length = next((place for place, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[:length]


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _own_generation_config_only(model: Any) -> Iterator[None]:
    """Hide the checkpoint's generation config, from which ``generate`` fills in what is not set (temperature, ...)."""
    published = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = published
