"""The weights of a model, an adapter on it or a run's checkpoint, read a block of rows at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dora_core.adapters.config import AdapterConfig
from dora_core.adapters.functional import gain, row_norm
from dora_core.adapters.inject import value_for
from dora_core.adapters.linear import scale_of
from dora_core.adapters.stored import CONFIG_FILE, SUFFIXES, StoredAdapter, named_base, read_adapter
from dora_core.config import read_yaml

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
STEP = re.compile(r"step-(\d{8})")


class WeightsError(ValueError):
    """A folder holds no weights that can be analysed, or two do not belong together."""


@dataclass
class ModelWeights:
    """Tensors by name, in files that are read when a tensor is asked for."""

    folder: Path
    files: dict[str, Path]
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, model: str | Path) -> ModelWeights:
        """Open a folder, or a hub name, in the layout of transformers: safetensors or .bin, in one file or several."""
        folder = Path(model)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(str(model), allow_patterns=["*.safetensors*", "*.bin*"]))
            except (OSError, ValueError) as error:
                raise WeightsError(
                    f"{model} is no folder, and could not be fetched as a model of the hub ({error}). Check the name."
                ) from None
        for name in WEIGHTS:
            index = folder / f"{name}.index.json"
            if index.is_file():
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return cls(folder, {key: folder / file for key, file in places.items()})
            if (folder / name).is_file():
                opened = cls(folder, {})
                opened.files = dict.fromkeys(opened._file(folder / name).keys(), folder / name)
                return opened
        raise WeightsError(f"{folder} holds none of {', '.join(WEIGHTS)} and their indexes. Give a model's folder.")

    def shape(self, name: str) -> Sequence[int]:
        """Return the shape of a tensor."""
        file = self._file(self.files[name])
        return file[name].shape if isinstance(file, dict) else file.get_slice(name).get_shape()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a matrix in its own type."""
        file = self._file(self.files[name])
        return (file[name] if isinstance(file, dict) else file.get_slice(name))[start:stop]

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = (
                    torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                    if path.suffix == ".bin"
                    else safe_open(path, framework="pt")
                )
            except (SafetensorError, OSError, RuntimeError) as error:
                raise WeightsError(f"{path} cannot be read: {error}. Copy or save the model again.") from None
        return self._open[path]


@dataclass
class Weights:
    """A model's matrices [out, in] with what an adapter makes of them."""

    base: ModelWeights
    modules: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """By module name in the adapter: lora_A, lora_B and magnitude, what there is of them."""
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors trained as they are."""
    config: AdapterConfig | None = None

    def __post_init__(self) -> None:
        keys = [key for key in self.base.files if key.endswith(".weight")]
        self._modules = {find_key(f"{name}.weight", keys, self.base.folder): name for name in self.modules}
        self._replaced = {}
        for name, tensor in self.replaced.items():
            if name.endswith(".weight") and tensor.dim() == 2:
                self._replaced[find_key(name, keys, self.base.folder)] = tensor
        for key, name in self._modules.items():
            lora_A, lora_B, magnitude = (self.modules[name].get(each) for each in SUFFIXES)
            self._require_shape(key, None if lora_A is None else (lora_B.shape[0], lora_A.shape[1]))
            self._require_shape(key, None if magnitude is None else (len(magnitude), self.shape(key)[1]))
        for key, tensor in self._replaced.items():
            self._require_shape(key, tuple(tensor.shape))

    def _require_shape(self, key: str, shape: tuple[int, int] | None) -> None:
        if shape is not None and shape != self.shape(key):
            raise WeightsError(
                f"{key} of {self.base.folder} is {list(self.shape(key))}; what was trained is for {list(shape)}. "
                "Give the base model it was trained on: --base MODEL."
            )

    def matrices(self) -> list[str]:
        """Return the names of all matrices, in the base's files."""
        return [key for key in self.base.files if key.endswith(".weight") and len(self.base.shape(key)) == 2]

    def trained(self) -> set[str]:
        """Return the names of the matrices that an adapter changes; empty for a plain model."""
        return {*self._modules, *self._replaced}

    def shape(self, name: str) -> tuple[int, int]:
        """Return the shape of a matrix."""
        num_rows, num_columns = self.base.shape(name)
        return num_rows, num_columns

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of the effective weight, m (W + s B A) / ||W + s B A|| for DoRA, in fp64."""
        if name in self._replaced:
            return self._replaced[name][start:stop].double()
        weight = self.base.rows(name, start, stop).double()
        module = self._modules.get(name)
        if module is None:
            return weight
        tensors = self.modules[module]
        lora_A, lora_B, magnitude = (tensors.get(key) for key in SUFFIXES)
        if lora_A is not None:
            rank = lora_A.shape[0]
            alpha = value_for(module, self.config.alpha_pattern, self.config.alpha)
            scale = scale_of(rank, alpha, self.config.rslora)
            weight = weight.addmm_(lora_B[start:stop].double(), lora_A.double(), alpha=scale)
        if magnitude is not None:
            weight *= gain(magnitude[start:stop].double(), row_norm(weight, None, None, 1.0))[:, None]
        return weight


def open_weights(path: str | Path, base: str | Path | None = None) -> Weights:
    """Open a model, an adapter's folder, or the folder of a checkpoint inside a run's folder.

    ``base`` is what the adapter was trained on; by default what its files name. Raises ``ValueError``.
    """
    folder = Path(path)
    if (folder / CONFIG_FILE).is_file():
        stored = read_adapter(folder)
        return _adapted(stored, base or named_base(folder), folder)
    if STEP.fullmatch(folder.name):
        config = read_yaml(folder.parent.parent / "config.yaml")
        return _adapted(_read_step(folder, config), base or config["model"].get("path"), folder)
    return Weights(ModelWeights.open(path))


def _adapted(stored: StoredAdapter, base: str | Path | None, folder: Path) -> Weights:
    if not base:
        raise WeightsError(f"{folder} names no base model. Give it: --base MODEL.")
    return Weights(ModelWeights.open(base), stored.modules, stored.extras, stored.config)


def _read_step(folder: Path, config: Mapping[str, Any]) -> StoredAdapter:
    """Return what a checkpoint of a run with ``config`` trains, under the names of the model in memory."""
    modules: dict[str, dict[str, Tensor]] = {}
    extras = {}
    with safe_open(folder / "weights.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            module, _, last = name.rpartition(".")
            if last in SUFFIXES:
                modules.setdefault(module, {})[last] = file.get_tensor(name)
            else:
                extras[name] = file.get_tensor(name)
    return StoredAdapter(AdapterConfig(**config["adapter"]), modules, extras, {}, {})


def find_key(name: str, keys: Sequence[str], where: Path | str) -> str:
    """Return which of ``keys`` is the tensor that is called ``name`` in memory, where prefixes may be others.

    What follows from the first numbered layer's collection on must be the same (all, where no layer is numbered); of
    several, the one that shares most words with ``name`` is meant. Raises ``WeightsError`` if none or several are left.
    """
    if name in keys:
        return name
    end = _end(name)
    found = [key for key in keys if _end(key) == end]
    words = set(name.split("."))
    scores = {key: len(words & set(key.split("."))) for key in found}
    best = [key for key in found if scores[key] == max(scores.values())]
    if len(best) != 1:
        what = f"{len(best)} weights could be meant: {', '.join(best[:3])}" if best else "no weight is called so"
        raise WeightsError(f"{where}: {name} was trained, and {what}. Give the base model it was trained on.")
    return best[0]


def _end(name: str) -> str:
    words = name.split(".")
    number = next((place for place, word in enumerate(words) if word.isdecimal()), None)
    return ".".join(words[max(0, number - 1) :] if number else words[-2:])
