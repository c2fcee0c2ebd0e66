"""The LLM pipeline as the registry sees it; heavy modules are imported when a verb is used."""

from __future__ import annotations

from collections.abc import Sequence

from dora_core.registry import PIPELINES
from pipelines.llm.config import RECIPES, LLMConfig


@PIPELINES.register("llm")
class LLMPipeline:
    """Causal language models: LLaMA, Qwen and relatives, on instruction rows; scored on commonsense reasoning."""

    config = LLMConfig
    recipes = RECIPES

    @staticmethod
    def prepare(arguments: Sequence[str]) -> None:
        """Write a small random LLaMA and a world of rows to train it on."""
        from pipelines.llm.prepare import main

        main(arguments)

    @staticmethod
    def train(arguments: Sequence[str]) -> None:
        """Train as ``deepspeed pipelines/llm/train.py`` does, in this one process."""
        from pipelines.llm.train import main

        main(arguments)

    @staticmethod
    def evaluate(arguments: Sequence[str]) -> None:
        """Score a base model, an adapter or a run."""
        from pipelines.llm.evaluate import main

        main(arguments)

    @staticmethod
    def merge(arguments: Sequence[str]) -> None:
        """Merge an adapter into a plain model that transformers loads."""
        from pipelines.llm.merge import main

        main(arguments)

    @staticmethod
    def demo(arguments: Sequence[str]) -> None:
        """Run this pipeline's slice of ``make demo``."""
        from pipelines.llm.demo import main

        main(arguments)
