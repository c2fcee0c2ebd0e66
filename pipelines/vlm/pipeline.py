"""The VLM pipeline as the registry sees it; heavy modules are imported when a verb is used."""

from __future__ import annotations

from collections.abc import Sequence

from dora_core.registry import PIPELINES
from pipelines.vlm.config import RECIPES, VLMConfig


@PIPELINES.register("vlm")
class VLMPipeline:
    """Vision-language models: LLaVA-1.5 on visual instructions; scored on the seven benchmarks of the paper."""

    config = VLMConfig
    recipes = RECIPES

    @staticmethod
    def prepare(arguments: Sequence[str]) -> None:
        """Write a small random LLaVA and a world of pictures to train it on."""
        from pipelines.vlm.prepare import main

        main(arguments)

    @staticmethod
    def train(arguments: Sequence[str]) -> None:
        """Train as ``deepspeed pipelines/vlm/train.py`` does, in this one process."""
        from pipelines.vlm.train import main

        main(arguments)

    @staticmethod
    def evaluate(arguments: Sequence[str]) -> None:
        """Score a base model, or one with an adapter."""
        from pipelines.vlm.evaluate import main

        main(arguments)

    @staticmethod
    def merge(arguments: Sequence[str]) -> None:
        """Merge an adapter into a plain model that transformers loads."""
        from pipelines.vlm.merge import main

        main(arguments)

    @staticmethod
    def demo(arguments: Sequence[str]) -> None:
        """Run this pipeline's slice of ``make demo``."""
        from pipelines.vlm.demo import main

        main(arguments)
