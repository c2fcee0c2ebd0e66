"""The video pipeline as the registry sees it; heavy modules are imported when a verb is used."""

from __future__ import annotations

from dora_core.registry import PIPELINES, verb
from pipelines.video.config import RECIPES, VideoConfig


@PIPELINES.register("video")
class VideoPipeline:
    """VL-BART on image-text and video-text tasks, many in one model; scored on the eight benchmarks of the paper."""

    config = VideoConfig
    recipes = RECIPES
    prepare = verb("pipelines.video.prepare")
    train = verb("pipelines.video.train")
    evaluate = verb("pipelines.video.evaluate")
    merge = verb("pipelines.video.merge")
    demo = verb("pipelines.video.demo")
