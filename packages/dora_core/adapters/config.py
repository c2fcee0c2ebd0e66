"""What to adapt and how: the one description that training, checkpoints and PEFT files share."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["dora", "lora", "full", "none"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """How a model is fine-tuned.

    ``targets``, ``exclude``, ``magnitude_targets`` and ``trainable`` hold patterns for module names. A list holds
    suffixes (``q_proj`` matches ``model.layers.0.self_attn.q_proj``); a plain string is one regular expression that
    must match the whole name. ``rank_pattern`` and ``alpha_pattern`` map a suffix or regular expression to another
    rank or alpha, as in PEFT.
    """

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    kind: Kind = "dora"
    """dora: magnitude and direction; lora: direction only; full: the targets' own weights; none: nothing."""
    rank: int = 32
    alpha: float = 64.0
    """The low-rank update is scaled by alpha / rank, or alpha / sqrt(rank) with ``rslora``."""
    rslora: bool = False
    dropout: float = 0.0
    dropout_mode: Literal["lowrank", "update"] = "lowrank"
    """lowrank: drops the input of the low-rank path (one base product). update: drops the input of the whole
    weight change, x W^T + drop(x) (gV - W)^T, as the paper's code does (a second base product)."""
    norm_gradient: Literal["detached", "full"] = "detached"
    """detached: the norm is a constant in the backward pass (eq. 11); full: it is differentiated (eq. 6)."""
    kernel: Literal["auto", "plain", "fused"] = "auto"
    """plain: torch's own operators, everywhere. fused: Triton kernels on a CUDA GPU, an error where they cannot run.
    auto: fused where they can run; the start of a run says which and why. Fused layers keep their output for the
    backward pass: kernels that overwrite it unseen by torch, such as Liger's RoPE, must be given a copy."""
    kept_outputs: list[str] | str = field(default_factory=list)
    """Adapted modules whose outputs activation checkpointing keeps: the recomputation then need not multiply by them
    again. Costs [tokens, out] of memory for each (twice that with a bias or in fp16) and the [tokens, r] of x A^T; pays
    off for the last projection of a block, such as ``down_proj``, whose output nothing else there needs, where the GPU
    is the bottleneck. With fused kernels alone; modules that are not adapted are passed over."""
    offload_kept_outputs: bool = False
    """Keep them in the host's memory, pinned: copied there and back while the GPU computes."""
    targets: list[str] | str = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    exclude: list[str] | str = field(default_factory=list)
    """Modules that neither kind of targets ever means, for example those of a vision tower."""
    magnitude_targets: list[str] | str = field(default_factory=list)
    """Modules whose magnitude alone is trained (paper, Table 6); only with ``kind: dora``."""
    trainable: list[str] | str = field(default_factory=list)
    """Modules trained as they are beside the adapter, for example a projector or layer norms."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases to train beside the adapter: PEFT's words for none, every one (but ``exclude``'s), and those of the
    adapted layers. A model with its adapter disabled keeps them as trained."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    """Seeds the adapters' initial A together with each module's name."""

    def __post_init__(self) -> None:
        def refuse(name: str, allowed: str, change: str) -> None:
            raise ValueError(f"adapter.{name} is {getattr(self, name)!r}; it must be {allowed}. {change}")

        if self.rank <= 0:
            refuse("rank", "a positive integer", "Set for example adapter.rank: 32.")
        for name, rank in self.rank_pattern.items():
            if rank <= 0:
                refuse("rank_pattern", "positive for every pattern", f"Change the rank of {name!r}.")
        if self.alpha <= 0 or any(alpha <= 0 for alpha in self.alpha_pattern.values()):
            refuse("alpha", "positive (alpha_pattern too)", "Set for example adapter.alpha: 64 (twice the rank).")
        if not 0.0 <= self.dropout < 1.0:
            refuse("dropout", "at least 0 and below 1", "Set adapter.dropout: 0.05 for the paper's value.")
        try:
            re.compile(self.exclude if isinstance(self.exclude, str) else "")
        except re.error:
            refuse("exclude", "a list of names or one regular expression", "Write [name] for a plain name.")
        if self.magnitude_targets and self.kind != "dora":
            refuse("magnitude_targets", "empty unless adapter.kind is dora", "Remove them or set adapter.kind: dora.")
        if self.offload_kept_outputs and not self.kept_outputs:
            refuse("offload_kept_outputs", "false unless adapter.kept_outputs names modules", "Name them or remove it.")
        if self.kind in ("dora", "lora") and not (self.targets or self.magnitude_targets):
            refuse("targets", "non-empty", "Name the modules to adapt, for example [q_proj, v_proj].")
        if self.kind == "full" and not (self.targets or self.trainable):
            refuse("targets", "non-empty", "Name the modules to train, for example [q_proj, v_proj].")
