"""Ask a LLaVA about pictures: greedy answers, whatever the batch size and number of ranks, up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_core.evaluation.evaluator import EvaluationContext
from dora_core.evaluation.generation import generate_texts
from dora_core.evaluation.runner import agree, equal_calls
from dora_core.media.images import ImageError
from pipelines.vlm.batches import stack_images
from pipelines.vlm.conversation import render_question
from pipelines.vlm.encode import Encoder, tokenize


@dataclass(frozen=True)
class Answering:
    """How questions and pictures become a model's inputs, as in training: ``extra["answering"]`` of the context."""

    encoder: Encoder
    dtype: torch.dtype
    """Of the pixels."""

    def prompt_ids(self, question: str, num_images: int) -> list[int]:
        """Return the prompt's tokens, those of the images in place."""
        tokenizer = self.encoder.tokenizer
        ids, _ = tokenize(tokenizer, render_question(question, num_images, self.encoder.section.template, tokenizer))
        image_id, per_image = self.encoder.image_id, self.encoder.vision.num_tokens
        return [each for token in ids for each in [token] * (per_image if token == image_id else 1)]


def answer_questions(
    prompts: Sequence[str], images: Sequence[str | bytes | None], context: EvaluationContext, max_new_tokens: int
) -> list[str]:
    """Return the model's answer to each prompt about its image (a path, encoded bytes, or None), ends stripped.

    Every rank must call it, also with no prompts. Raises ``ValueError`` on every rank, once all are done, for a
    picture that cannot be read: a score over the others would not be the benchmark's.
    """
    answering: Answering = context.extra["answering"]
    device = context.device or next(context.model.parameters()).device
    problems: list[ImageError] = []

    def pixels_or_blank(image: str | bytes) -> Tensor:
        try:
            return answering.encoder.pixels(image)
        except ImageError as error:  # the other ranks are in the middle of their calls
            problems.append(error)
            return stack_images([], answering.encoder.vision.size)[0]

    with ThreadPoolExecutor(context.section.num_workers) as pool:

        def pixels_of(places: list[int]) -> dict[str, Tensor]:
            shown = [images[place] for place in places if images[place] is not None]
            stacked = stack_images(list(pool.map(pixels_or_blank, shown)), answering.encoder.vision.size)
            return {"pixel_values": answering.encoder.transform.normalize(stacked, answering.dtype, device)}

        texts = generate_texts(
            context.model,
            context.tokenizer,
            [
                answering.prompt_ids(prompt, int(image is not None))
                for prompt, image in zip(prompts, images, strict=True)
            ],
            batch_size=context.section.batch_size,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            inputs_for=pixels_of,
            num_calls=equal_calls(len(prompts), context.section.batch_size, context),
            synced=context.synced,
            device=device,
        )

    def finish() -> list[str]:
        if problems:
            raise problems[0]
        return [text.strip() for text in texts]

    return agree(finish, context)
