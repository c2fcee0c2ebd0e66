"""The VLM pipeline as the registry sees it; heavy modules are imported when a verb is used."""

from __future__ import annotations

from dora_core.registry import PIPELINES, verb
from pipelines.vlm.config import RECIPES, VLMConfig


@PIPELINES.register("vlm")
class VLMPipeline:
    """Vision-language models: LLaVA-1.5 on visual instructions; scored on the seven benchmarks of the paper."""

    config = VLMConfig
    recipes = RECIPES
    prepare = verb("pipelines.vlm.prepare")
    train = verb("pipelines.vlm.train")
    evaluate = verb("pipelines.vlm.evaluate")
    merge = verb("pipelines.vlm.merge")
    demo = verb("pipelines.vlm.demo")
