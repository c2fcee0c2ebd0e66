"""Let a VL-BART write about what it sees, the same for every batch size and number of ranks, up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_core.adapters.merge import evaluation_mode
from dora_core.config import require
from dora_core.data.collate import TokenRow, pad_rows
from dora_core.evaluation.evaluator import EvaluationContext
from dora_core.evaluation.generation import generate_texts
from dora_core.evaluation.runner import agree, equal_calls
from pipelines.video.batches import to_model
from pipelines.video.encode import TextEncoder
from pipelines.video.features import FrozenEncoder
from pipelines.video.looking import Look, Seen
from pipelines.video.model import decoder_start
from pipelines.video.task import Example, Task


@dataclass(frozen=True)
class Answering:
    """How rows become a model's inputs, as in training: ``extra["answering"]`` of the context."""

    text: TextEncoder
    look: Look
    encoder: FrozenEncoder | None
    tasks: dict[str, Task]
    """By name, with the recipe's changes of lengths."""

    def prompt(self, example: Example, task: Task) -> list[int]:
        """Return the tokens of a row's text."""
        length = self.tasks.get(task.name, task).max_text_length
        return self.text.text(example, length)[0]


class _Eyes:
    """Reads what rows see, in threads; remembers what could not be read."""

    def __init__(self, examples: Sequence[Example], context: EvaluationContext, pool: ThreadPoolExecutor) -> None:
        self._answering: Answering = context.extra["answering"]
        self._look = self._answering.look
        self._one_frame = context.section.look == "one_frame"
        self._examples = examples
        self._pool = pool
        self._device = context.device or next(context.model.parameters()).device
        self.problems: list[ValueError | OSError] = []

    def inputs(self, places: Sequence[int]) -> dict[str, Any]:
        """Return the visual inputs of the rows at ``places``, or of nothing if there are none."""
        rows = [self._examples[place].visuals for place in places]
        seen = list(self._pool.map(self._read, [visual for row in rows for visual in row]))
        stacked = self._look.stack(
            [seen[place * len(row) : (place + 1) * len(row)] for place, row in enumerate(rows)]
            or [[self._look.nothing()]]
        )
        return to_model(stacked, self._look, self._answering.encoder, self._device)

    def _read(self, visual: str) -> Seen:
        try:
            seen = self._look.read(visual)
        except (ValueError, OSError) as error:  # the other ranks are in the middle of their calls
            self.problems.append(error)
            return self._look.nothing()
        if not self._one_frame:
            return seen
        middle = seen[len(seen) // 2 : len(seen) // 2 + 1]
        return np.repeat(middle, len(seen), 0) if isinstance(seen, np.ndarray) else middle.repeat(len(seen), 1, 1, 1)

    def finish(self, results: list[Any]) -> list[Any]:
        """Return ``results``; raises what could not be read: a score over the others would not be the benchmark's."""
        if self.problems:
            raise self.problems[0]
        return results


def generate_targets(
    examples: Sequence[Example], task: Task, context: EvaluationContext, *, num_beams: int, max_new_tokens: int
) -> list[str]:
    """Return what the model writes for each example, ends stripped, by beam search.

    Every rank must call it, also with no examples. Raises ``ValueError`` on every rank, once all are done, for
    features or media that cannot be read.
    """
    answering: Answering = context.extra["answering"]
    section = context.section
    positions = context.model.config.max_position_embeddings
    limit = f"less than the {positions} positions of the model"
    require(max_new_tokens < positions, "evaluate.max_new_tokens", max_new_tokens, limit, "Lower it.")
    prompts = agree(lambda: [answering.prompt(example, task) for example in examples], context)
    with ThreadPoolExecutor(section.num_workers) as pool:
        eyes = _Eyes(examples, context, pool)
        texts = generate_texts(
            context.model,
            context.tokenizer,
            prompts,
            batch_size=section.batch_size,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            inputs_for=eyes.inputs,
            num_calls=equal_calls(len(prompts), section.batch_size, context),
            synced=context.synced,
            device=context.device,
        )
    return agree(lambda: eyes.finish([text.strip() for text in texts]), context)


@torch.no_grad()
def word_scores(
    examples: Sequence[Example], task: Task, context: EvaluationContext, words: Sequence[str]
) -> list[list[float]]:
    """Return for each example the log-probability of each word's first token where a target begins.

    Every rank must call it, also with no examples; raises as ``generate_targets`` does.
    """
    answering: Answering = context.extra["answering"]
    section, model, tokenizer = context.section, context.model, context.tokenizer
    prompts = agree(lambda: [answering.prompt(example, task) for example in examples], context)
    targets = [tokenizer(word)["input_ids"] for word in words]
    begin = next(place for place, ids in enumerate(zip(*targets, strict=False)) if len(set(ids)) > 1)
    prefix = [decoder_start(model.config), *targets[0][:begin]]
    device = context.device or next(model.parameters()).device
    num_calls = equal_calls(len(prompts), section.batch_size, context) or -(-len(prompts) // section.batch_size)
    scores: list[list[float]] = []
    with ThreadPoolExecutor(section.num_workers) as pool, evaluation_mode(model):
        eyes = _Eyes(examples, context, pool)
        for call in range(num_calls):
            places = range(len(prompts))[call * section.batch_size : (call + 1) * section.batch_size]
            rows = [TokenRow(prompts[place], prompts[place]) for place in places]
            texts = pad_rows(rows, tokenizer.pad_token_id)
            start = torch.tensor([prefix], device=device).repeat(max(1, len(rows)), 1)
            inputs: dict[str, Tensor] = {name: texts[name].to(device) for name in ("input_ids", "attention_mask")}
            logits = model(**inputs, **eyes.inputs(places), decoder_input_ids=start, use_cache=False).logits[:, -1]
            chosen = logits.float().log_softmax(-1)[:, [ids[begin] for ids in targets]]
            scores += chosen[: len(rows)].tolist()
    return agree(lambda: eyes.finish(scores), context)
