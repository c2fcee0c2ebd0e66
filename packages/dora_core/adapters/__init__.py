"""LoRA and DoRA adapters for PyTorch models."""

from dora_core.adapters.checkpoint import load_adapter, save_adapter
from dora_core.adapters.config import AdapterConfig
from dora_core.adapters.dora_linear import DoRALinear
from dora_core.adapters.groups import parameter_groups
from dora_core.adapters.inject import AdapterError, apply_adapters
from dora_core.adapters.linear import LoRALinear
from dora_core.adapters.merge import (
    MergeReport,
    adapters_disabled,
    compare_merged,
    merge_adapters,
    merge_and_unload,
    unmerge_adapters,
)
from dora_core.adapters.norm_reuse import NormReuse, reuse_norms
from dora_core.adapters.recomputation import checkpoint_activations
from dora_core.adapters.report import AdapterReport

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "AdapterReport",
    "DoRALinear",
    "LoRALinear",
    "MergeReport",
    "NormReuse",
    "adapters_disabled",
    "apply_adapters",
    "checkpoint_activations",
    "compare_merged",
    "load_adapter",
    "merge_adapters",
    "merge_and_unload",
    "parameter_groups",
    "reuse_norms",
    "save_adapter",
    "unmerge_adapters",
]
