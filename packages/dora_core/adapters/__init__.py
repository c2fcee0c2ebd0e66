"""LoRA and DoRA adapters for PyTorch models."""

from dora_core.adapters.checkpoint import load_adapter, save_adapter
from dora_core.adapters.config import AdapterConfig
from dora_core.adapters.inject import AdapterError, AdapterReport, apply_adapters, parameter_groups
from dora_core.adapters.linear import DoRALinear, LoRALinear, adapters_disabled, reuse_norms
from dora_core.adapters.merge import MergeReport, merge_adapters, merge_and_unload, unmerge_adapters

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "AdapterReport",
    "DoRALinear",
    "LoRALinear",
    "MergeReport",
    "adapters_disabled",
    "apply_adapters",
    "load_adapter",
    "merge_adapters",
    "merge_and_unload",
    "parameter_groups",
    "reuse_norms",
    "save_adapter",
    "unmerge_adapters",
]
