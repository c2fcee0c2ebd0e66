"""Write a model as transformers reads it, one parameter at a time, so that ZeRO-3 never gathers the whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from dora_core.adapters import load_adapter, merge_and_unload
from dora_core.adapters.sharded import gathered
from dora_core.engine.build import DTYPES, narrow_forward

MAX_SHARD_BYTES = 4 << 30


def save_model(model: PreTrainedModel, folder: str | Path, precision: str) -> Path:
    """Write weights (in ``precision``), config and generation config to ``folder`` and return it.

    Every rank must call it; rank 0 writes and holds at most one shard. The model must be free of adapters:
    ``merge_and_unload`` first. Tied weights are written once.
    """
    folder = Path(folder)
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    num_bytes = total = 0
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("model*.safetensors*"):  # an old single file would be read before new shards
            old.unlink()

    def flush() -> None:
        nonlocal held, num_bytes
        if held:
            save_file(held, folder / _name(len(shards), 0), {"format": "pt"})
            shards.append(list(held))
            held, num_bytes = {}, 0

    persistent = set(model.state_dict())
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in persistent)]
    for name, tensor in tensors:
        with gathered([tensor]):
            if not main:
                continue
            dtype = DTYPES[precision] if tensor.is_floating_point() else tensor.dtype
            value = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        size = value.numel() * value.element_size()
        if num_bytes + size > MAX_SHARD_BYTES:
            flush()
        held[name] = value
        num_bytes += size
        total += size
    if not main:
        return folder
    flush()
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        final = "model.safetensors" if len(shards) == 1 else _name(number, len(shards))
        (folder / _name(number, 0)).rename(folder / final)
        index |= dict.fromkeys(names, final)
    if len(shards) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.dtype = DTYPES[precision]
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        save_generation_config(model.generation_config, folder)
    return folder


def merge_to_folder(
    model: PreTrainedModel, adapter: Path, output: Path, precision: str, probe: Mapping[str, Any] | None = None
) -> None:
    """Merge the adapter of a folder into its base on the CPU, write the result to ``output`` and say what changed.

    ``probe``, as of ``merge_and_unload``, is what logits are compared on.
    """
    model.eval()
    _, report = load_adapter(model, adapter)
    narrow_forward(model, precision, "cpu")
    print(report)
    print(f"merged {merge_and_unload(model, probe)}")
    print(f"wrote {save_model(model, output, precision)}")


def save_generation_config(settings: GenerationConfig, folder: Path) -> None:
    """Write the generation settings. Some published ones set a temperature without sampling, which transformers
    refuses to save: those sample, as they were meant to."""
    try:
        settings.save_pretrained(folder)
    except ValueError:
        GenerationConfig(**{**settings.to_diff_dict(), "do_sample": True}).save_pretrained(folder)


def _name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"
