"""Write a model as transformers reads it, one parameter at a time, so that ZeRO-3 never gathers the whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from dora_core.adapters import compare_merged, load_adapter
from dora_core.adapters.agreement import on_rank_0
from dora_core.adapters.checkpoint import write_tensors
from dora_core.adapters.merge import adapted_layers, merged_weight
from dora_core.adapters.report import AdapterReport
from dora_core.adapters.sharded import full_numel, gathered
from dora_core.adapters.stored import SUFFIXES
from dora_core.engine.build import DTYPES, narrow_forward

MAX_SHARD_BYTES = 4 << 30


def save_model(model: PreTrainedModel, folder: str | Path, precision: str) -> Path:
    """Write weights (in ``precision``), config and generation config to ``folder`` and return it.

    Every rank must call it; rank 0 writes and holds at most one shard. Adapters are written merged, their weights made
    one at a time. Tied weights are written once. Raises ``ValueError`` on every rank as ``require_target`` does, or if
    a file cannot be written, which leaves no weights behind.
    """
    folder = Path(folder)
    require_target(model, folder, precision)
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    shards = _Shards(folder)
    layers = adapted_layers(model, required=False)
    for name, tensor in _tensors(model).items():
        layer = layers.get(name.removesuffix(".weight"))
        with gathered([tensor] if layer is None else layer.parameters()):
            if main:
                value = tensor.detach() if layer is None else merged_weight(layer)
                shards.add(name, value.to("cpu", _dtype(tensor, precision), copy=layer is None).contiguous())

    def finish() -> None:
        try:
            shards.finish()
            config = model.config.__class__.from_dict(model.config.to_dict())
            config.dtype = DTYPES[precision]
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
            if model.can_generate() and model.generation_config is not None:
                save_generation_config(model.generation_config, folder)
        except OSError as error:
            shards.remove()
            raise ValueError(
                f"The model could not be written to {folder}, which holds no weights now: {error}. Make room or check "
                "permissions, then save it again."
            ) from None

    on_rank_0(finish)
    return folder


def require_target(model: PreTrainedModel, folder: Path, precision: str) -> None:
    """Raise ``ValueError`` unless ``folder``, which need not exist, can take the model's weights.

    It must not be the folder that the model was read from, and have room; the weights that ``save_model`` would
    replace there count as room. Every rank must call it.
    """

    def check() -> None:
        if folder.resolve() == Path(model.name_or_path or "/").resolve():
            raise ValueError(
                f"{folder} holds the weights that the model is made of. Choose another folder for the result."
            )
        tensors = _tensors(model).values()
        needed = sum(full_numel(tensor) * _dtype(tensor, precision).itemsize for tensor in tensors)
        disk = next(place for place in (folder, *folder.resolve().parents) if place.is_dir())
        room = shutil.disk_usage(disk).free + sum(old.lstat().st_size for old in _weights(folder))
        if needed > room:
            raise ValueError(
                f"The weights in {precision} take {needed / 2**30:.1f} GiB, and {folder} has room for "
                f"{room / 2**30:.1f} GiB. Make room, or choose a folder on another disk."
            )

    on_rank_0(check)


class _Shards:
    """Files of a model's weights, each of at most ``MAX_SHARD_BYTES``; after a failure ``add`` does nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: list[list[str]] = []
        self._held: dict[str, Tensor] = {}
        self._held_bytes = self._num_bytes = 0
        self._problem: OSError | None = None

    def add(self, name: str, value: Tensor) -> None:
        """Take one more tensor, and write what was held if it would become too much."""
        size = value.numel() * value.element_size()
        if self._held_bytes + size > MAX_SHARD_BYTES:
            self._flush()
        if self._problem is None:
            self._held[name] = value
            self._held_bytes += size
            self._num_bytes += size

    def finish(self) -> None:
        """Write the rest and the index. Raises ``OSError`` for what could not be written."""
        self._flush()
        if self._problem is not None:
            raise self._problem
        index: dict[str, str] = {}
        for number, names in enumerate(self._names):
            final = "model.safetensors" if len(self._names) == 1 else _name(number, len(self._names))
            (self._folder / _name(number, 0)).rename(self._folder / final)
            index |= dict.fromkeys(names, final)
        if len(self._names) > 1:
            text = json.dumps({"metadata": {"total_size": self._num_bytes}, "weight_map": index}, indent=2)
            (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        if self._held and self._problem is None:
            try:
                if not self._names:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    self.remove()  # an old single file would be read before new shards
                write_tensors(self._held, self._folder / _name(len(self._names), 0))
                self._names.append(list(self._held))
            except OSError as error:  # the other ranks are on their way to the next tensor
                self._problem = error
        self._held, self._held_bytes = {}, 0

    def remove(self) -> None:
        """Remove all weights that are in the folder."""
        for old in _weights(self._folder):
            old.unlink()


def _weights(folder: Path) -> list[Path]:
    """Return the files of weights in a folder, those included that a killed process left unfinished."""
    found = [*folder.glob("model*.safetensors*"), *folder.glob(".tmp-model*.safetensors")]
    return [path for path in found if not path.is_dir()]


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    persistent = set(model.state_dict())
    adapters = {f"{name}.{key}" for name in adapted_layers(model, required=False) for key in SUFFIXES}
    parameters = {name: parameter for name, parameter in model.named_parameters() if name not in adapters}
    return {**parameters, **{name: buffer for name, buffer in model.named_buffers() if name in persistent}}


def _dtype(tensor: Tensor, precision: str) -> torch.dtype:
    return DTYPES[precision] if tensor.is_floating_point() else tensor.dtype


def merge_to_folder(
    model: PreTrainedModel,
    adapter: Path,
    output: Path,
    precision: str,
    probe: Mapping[str, Any] | None = None,
    load: Callable[[nn.Module, Path], AdapterReport | None] = lambda model, folder: load_adapter(model, folder)[1],
) -> None:
    """Merge the adapter of a folder into its base on the CPU, write the result to ``output`` and say what changed.

    ``probe``, as of ``compare_merged``, is what logits are compared on; ``load`` puts the adapter in.
    """
    require_target(model, output, precision)  # before the work
    model.eval()
    print(load(model, adapter))
    narrow_forward(model, precision, "cpu")
    print(f"merged {compare_merged(model, probe)}")
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
