"""Write what a run has made: an adapter with what else was trained, or a whole VL-BART."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dora_core.adapters import save_adapter
from dora_core.adapters.linear import LoRALinear
from dora_core.engine.distributed import World
from dora_core.engine.export import save_model
from pipelines.video.config import VideoConfig
from pipelines.video.vl_bart import VLBart


def export(model: VLBart, folder: Path, tokenizer: PreTrainedTokenizerBase, cfg: VideoConfig, world: World) -> Path:
    """Write the result of training below ``folder`` and return where. Every rank must call it; rank 0 writes."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        target = save_adapter(model, cfg.adapter, folder / "adapter", cfg.model.path)
    else:
        target = save_model(model, folder / "model", cfg.train.precision)
    world.on_main(lambda: tokenizer.save_pretrained(target))
    return target
