"""What a section of a configuration is, and the sections that every pipeline shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, dataclass_transform

C = TypeVar("C")


class ConfigError(ValueError):
    """A recipe or a command line does not describe a valid configuration."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[C]) -> type[C]:
    """Make ``cls`` a frozen keyword-only dataclass that refuses unknown keys, infinities and NaN."""
    cls.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}
    return dataclass(frozen=True, kw_only=True)(cls)


def require(ok: bool, name: str, given: Any, allowed: str, change: str = "") -> None:
    """Raise ``ValueError`` in three parts unless ``ok``: what was given, what is allowed, what to change."""
    if not ok:
        raise ValueError(f"{name} is {given!r}; it must be {allowed}. {change}".rstrip())


@section
class RunSection:
    """Where a run lives and what makes it repeatable."""

    name: str = "run"
    root: str = "runs"
    """The run folder is ``root/name``."""
    seed: int = 0
    resume: Literal["never", "auto", "must"] = "never"
    """never: the folder must hold no checkpoint; auto: resume if there is one; must: fail if there is none."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms (CUDA only; the CPU path is deterministic as it is)."""

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "run.name", self.name, "a folder name without '/'")


@section
class TrainSection:
    """One optimizer step takes ``global_batch_size`` rows: micro-batches x accumulation steps x ranks."""

    lr: float
    global_batch_size: int = 16
    micro_batch_size: int = 16
    """Rows per rank and forward pass; accumulation follows from the three numbers."""
    num_epochs: float = 3.0
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever ``num_epochs`` says."""
    optimizer: Literal["adamw", "adamw_foreach", "adamw_loop", "sgd"] = "adamw"
    """adamw is torch's fused AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applies to A, B and full weights of two or more dimensions; never to the magnitude unless asked for."""
    magnitude_lr: float | None = None
    """Learning rate of the magnitudes; ``lr`` if not given."""
    magnitude_weight_decay: float = 0.0
    b_lr_ratio: float = 1.0
    """Learning rate of B over that of A (LoRA+)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    warmup_ratio: float | None = None
    """Share of all steps; give this or ``warmup_steps``."""
    clip_grad_norm: float | None = 1.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of the frozen weights and of the computation; what is trained is kept in fp32."""
    gradient_checkpointing: bool = True
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's Triton kernels, and a loss without whole logits. auto: on CUDA, whatever fits the model; on: an error
    where nothing can be used."""
    eval_every: int | None = None
    """Evaluate the loss on the validation rows every this many steps, and at the end."""
    save_every: int | None = None
    keep_last: int = 2
    keep_best: bool = True
    """Also keep the checkpoint of the lowest validation loss, and export that one."""
    log_every: int = 10

    def __post_init__(self) -> None:
        require(self.lr > 0, "train.lr", self.lr, "positive")
        for name in ("global_batch_size", "micro_batch_size", "log_every", "keep_last"):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "a positive integer")
        for name in ("max_steps", "eval_every", "save_every"):
            given = getattr(self, name)
            require(given is None or given > 0, f"train.{name}", given, "a positive integer or absent")
        for name in ("num_epochs", "eps", "b_lr_ratio"):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "positive")
        for name in ("weight_decay", "magnitude_weight_decay", "warmup_steps"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        require(all(0 <= beta < 1 for beta in self.betas), "train.betas", self.betas, "two numbers in [0, 1)")
        require(
            self.magnitude_lr is None or self.magnitude_lr > 0,
            "train.magnitude_lr",
            self.magnitude_lr,
            "positive, or null for train.lr",
        )
        require(
            self.warmup_ratio is None or (0 <= self.warmup_ratio < 1 and self.warmup_steps == 0),
            "train.warmup_ratio",
            self.warmup_ratio,
            "in [0, 1), with train.warmup_steps at 0",
            "Give the warm-up once, as steps or as a ratio.",
        )
        require(
            self.clip_grad_norm is None or self.clip_grad_norm > 0,
            "train.clip_grad_norm",
            self.clip_grad_norm,
            "positive, or null for no clipping",
        )

    def accumulation(self, world_size: int) -> int:
        """Return micro-batches per optimizer step and rank; an error says which batch sizes would divide."""
        per_pass = self.micro_batch_size * world_size
        if self.global_batch_size % per_pass:
            usable = sorted(
                size
                for size in range(1, self.micro_batch_size + 1)
                if self.global_batch_size % (size * world_size) == 0
            )
            raise ConfigError(
                f"train.global_batch_size {self.global_batch_size} does not divide into micro-batches of "
                f"{self.micro_batch_size} rows on {world_size} ranks. "
                + (
                    f"Use train.micro_batch_size: {usable[-1]}."
                    if usable
                    else f"Use a train.global_batch_size that is a multiple of {world_size}."
                )
            )
        return self.global_batch_size // per_pass


@section
class LogSection:
    """Where metrics go beside ``metrics.jsonl``, which is always written."""

    tensorboard: bool = True
    wandb_project: str | None = None
    """Needs the extra ``wandb``."""
    progress: bool = True
    profile_step: int | None = None
    """Profile three steps from this one on, on rank 0: ``profile.json`` and ``trace.json.gz`` in the run's folder."""

    def __post_init__(self) -> None:
        given = self.profile_step
        require(given is None or given > 1, "log.profile_step", given, "2 or more, or absent", "Step 1 is a warm-up.")


@section
class DeepSpeedSection:
    """Which ZeRO mechanics to use."""

    config: str = "zero2"
    """A name from ``deepspeed_configs/`` or a path to a JSON file of ZeRO settings."""
    timeout_s: float = 1800.0
    """How long a collective may wait for the other ranks before the run stops."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Merged into ``zero_optimization``, for example {stage3_param_persistence_threshold: 0}."""

    def __post_init__(self) -> None:
        require(self.timeout_s > 0, "deepspeed.timeout_s", self.timeout_s, "a positive number of seconds")
