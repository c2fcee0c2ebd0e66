"""The LLM pipeline as the registry sees it; heavy modules are imported when a verb is used."""

from __future__ import annotations

from dora_core.registry import PIPELINES, verb
from pipelines.llm.config import RECIPES, LLMConfig


@PIPELINES.register("llm")
class LLMPipeline:
    """Causal language models: LLaMA, Qwen and relatives, on instruction rows; scored on commonsense reasoning."""

    config = LLMConfig
    recipes = RECIPES
    prepare = verb("pipelines.llm.prepare")
    train = verb("pipelines.llm.train")
    evaluate = verb("pipelines.llm.evaluate")
    merge = verb("pipelines.llm.merge")
    demo = verb("pipelines.llm.demo")
    study = verb("pipelines.llm.study")
