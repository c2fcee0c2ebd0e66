"""Which ZeRO mechanics a run uses: read a DeepSpeed JSON, refuse what the recipe says, add what follows from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_core.config import ConfigError, DeepSpeedSection, TrainSection
from dora_core.engine.distributed import World
from dora_core.registry import unknown_name

# One home per number: these belong to the recipe.
_RECIPE_FIELDS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "gradient_clipping": "train.clip_grad_norm",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "amp": "train.precision",
}


@dataclass(frozen=True)
class Zero:
    """ZeRO settings resolved for a run: the stage and the whole DeepSpeed configuration."""

    stage: int
    config: dict[str, Any]
    precision: str

    @contextmanager
    def sharded_loading(self) -> Iterator[None]:
        """Within the block ``from_pretrained`` and ``from_config`` of transformers partition weights as they come.

        Only for stage 3; in the others the block does nothing.
        """
        if self.stage < 3:
            yield
            return
        from transformers.integrations import HfDeepSpeedConfig

        # The type of the frozen weights. The engine itself runs without DeepSpeed's mixed precision: what is trained
        # stays in fp32 beside them, which its blocks "bf16" and "fp16" do not allow.
        loading = {**self.config}
        if self.precision != "fp32":
            loading[self.precision] = {"enabled": True}
        keep = HfDeepSpeedConfig(loading)  # transformers asks for it as long as this object lives
        try:
            yield
        finally:
            del keep


def zero_configs() -> dict[str, Path]:
    """Return the shipped ZeRO settings by name."""
    here = Path(__file__).resolve().parent
    for folder in (here / "deepspeed_configs", here.parents[2] / "deepspeed_configs"):
        found = {path.stem: path for path in sorted(folder.glob("*.json"))}
        if found:
            return found
    return {}


def resolve_zero(section: DeepSpeedSection, train: TrainSection, world: World) -> Zero:
    """Return the DeepSpeed configuration of a run. Raises ``ConfigError`` on what cannot be right."""
    known = zero_configs()
    path = known.get(section.config, Path(section.config))
    if not path.is_file():
        raise unknown_name(
            "DeepSpeed configuration",
            section.config,
            sorted(known),
            " Give one of these names or the path of a JSON file.",
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("zero_optimization", {}), dict):
        raise ConfigError(f"{path} must hold a JSON object with an object zero_optimization. See {known.get('zero2')}.")
    for key, field in _RECIPE_FIELDS.items():
        if key in raw:
            raise ConfigError(f"{path} sets {key!r}, which is the recipe's to say. Remove it there and set {field}.")
    zero = {**raw.get("zero_optimization", {}), **section.extra}
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3.")
    if train.clip_grad_norm is None and stage > 0 and train.precision == "fp16":
        raise ConfigError("train.clip_grad_norm is null; fp16 needs it to notice overflows. Set for example 1.0.")
    config = {
        **raw,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.accumulation(world.size),
        "gradient_clipping": (train.clip_grad_norm or 0.0) if stage > 0 else 0.0,  # without ZeRO the engine clips
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU as fast, without a build
        "steps_per_print": None,
    }
    return Zero(stage, config, train.precision)
