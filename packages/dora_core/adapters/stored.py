"""Read an adapter's files into plain tensors: PEFT's layout, and that of the DoRA authors' own code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dora_core.adapters.config import AdapterConfig
from dora_core.adapters.inject import AdapterError, matches, value_for

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
METADATA_KEY = "dora_core"
"""In the metadata of the weights: what PEFT's configuration has no field for."""

_REFERENCE_WEIGHTS_FILE = "adapter_model.bin"
_REFERENCE_MAGNITUDE = ".weight_m_wdecomp.weight"
_ENDINGS = {ending: own for own, ending in SUFFIXES.items()} | {
    ".lora_magnitude_vector.weight": "magnitude",
    _REFERENCE_MAGNITUDE: "magnitude",
}
_BASE_WEIGHT = ".base_layer.weight"
BASE_BIAS = ".base_layer.bias"
"""How PEFT names the trained bias of an adapted layer."""
# PEFT's options that change the function computed and that these layers do not have.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_UNUSED = (None, False, "none", [], {})
_INITS_THAT_CHANGE_THE_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")

Modules = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it was found on disk, under the names used here."""

    config: AdapterConfig
    modules: Modules
    """By module name: lora_A [r, in], lora_B [out, r] and magnitude [out]; the magnitude alone where only it trains."""
    extras: dict[str, Tensor]
    """Tensors of modules trained as they are, by their names in the model."""
    base_weights: dict[str, Tensor]
    """By module name: copies of frozen weights, which PEFT adds for an adapted output layer."""
    biases: dict[str, Tensor]
    """By module name: trained biases [out] of modules that are not trained otherwise."""


def read_adapter(folder: Path) -> StoredAdapter:
    """Read the adapter in ``folder``. Raises ``AdapterError`` if files are missing, broken or contradict each other."""
    raw = _read_config(folder)
    flat, metadata = _read_weights(folder)
    modules, others, base_weights = _sort_tensors(flat, folder)
    trains_biases = raw.get("bias") or "none"
    extras, biases = _part_biases(others, set(modules)) if trains_biases != "none" else (others, {})
    _refuse_strangers(extras, modules, folder)
    exclude = raw.get("exclude_modules") or []
    if any(matches(name, exclude) for name in biases):  # PEFT trains the biases of excluded modules too
        exclude = []
    is_reference = raw["peft_type"] == "DORA"
    is_dora = is_reference or bool(raw.get("use_dora"))
    _check_magnitudes(is_dora, modules, folder)
    magnitude_only = set(metadata.get("magnitude_only", []))
    if is_reference:
        magnitude_only = {name for name, tensors in modules.items() if set(tensors) == {"magnitude"}}
    for name in magnitude_only & set(modules):
        modules[name] = {"magnitude": modules[name]["magnitude"]}
    factored = sorted(set(modules) - magnitude_only)
    explicit = (
        is_reference or magnitude_only or raw.get("exclude_modules") or raw.get("layers_to_transform") is not None
    )
    targets = raw.get("target_modules")
    try:
        config = AdapterConfig(
            kind="dora" if is_dora else "lora",
            rank=int(raw.get("r", 8)),
            alpha=float(raw.get("lora_alpha", 8)),
            rslora=bool(raw.get("use_rslora")),
            dropout=float(raw.get("lora_dropout", 0.0)),
            dropout_mode=metadata.get("dropout_mode", "update" if is_dora else "lowrank"),
            norm_gradient=metadata.get("norm_gradient", "full" if raw.get("dora_simple") is False else "detached"),
            targets=factored if explicit or targets in (None, "all-linear") else targets,
            magnitude_targets=sorted(magnitude_only),
            trainable=sorted({name.rpartition(".")[0] for name in extras}),
            bias=trains_biases,
            exclude=exclude,
            rank_pattern={key: int(rank) for key, rank in _used_patterns(raw, "rank_pattern", factored)},
            alpha_pattern={key: float(alpha) for key, alpha in _used_patterns(raw, "alpha_pattern", factored)},
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG_FILE} cannot be used: {str(error).rstrip('.')}.") from None
    return StoredAdapter(config, modules, extras, base_weights, biases)


def named_base(folder: Path) -> str | None:
    """Return the base model that the configuration of an adapter names; None if it names none, or is not there."""
    path = folder / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") if path.is_file() else None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{folder} holds no {CONFIG_FILE}. Give the folder that an adapter was saved to.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON: {error}. Save the adapter again.") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} holds a {type(raw).__name__}, not an object. Save the adapter again.")
    if raw.get("peft_type") not in ("LORA", "DORA"):
        raise AdapterError(f"{path}: peft_type is {raw.get('peft_type')!r}; only LORA and DORA can be loaded.")
    for key in _UNSUPPORTED:
        if raw.get(key) not in _UNUSED:
            raise AdapterError(
                f"{path}: {key} is {raw[key]!r}; these layers do not support that option. Load the adapter with PEFT, "
                "or train it without."
            )
    init = str(raw.get("init_lora_weights")).lower()
    if init.startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise AdapterError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights as well. Convert the adapter to "
            "plain LoRA with PEFT first (path_initial_model_for_weight_conversion)."
        )
    return raw


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors under the file's names, and what else these layers need to know."""
    path, reference_path = folder / WEIGHTS_FILE, folder / _REFERENCE_WEIGHTS_FILE
    try:
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
                return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 (no mapping)
        if reference_path.is_file():
            return torch.load(reference_path, map_location="cpu", weights_only=True), {}
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise AdapterError(
            f"The weights in {folder} cannot be read: {error}. Copy or save the adapter again."
        ) from None
    raise AdapterError(f"{folder} holds neither {WEIGHTS_FILE} nor {_REFERENCE_WEIGHTS_FILE}. Save the adapter again.")


def _sort_tensors(flat: dict[str, Tensor], folder: Path) -> tuple[Modules, dict[str, Tensor], dict[str, Tensor]]:
    """Return the adapters' tensors by module, the other trained tensors, and copies of the base's weights."""
    modules: Modules = {}
    others: dict[str, Tensor] = {}
    for key, tensor in flat.items():
        if not key.startswith(PREFIX):
            raise AdapterError(
                f"{folder}: tensor {key!r} does not start with {PREFIX!r}, so this is not an adapter in PEFT's layout."
            )
        if ".lora_embedding_" in key:
            raise AdapterError(f"{folder}: {key!r} adapts an embedding; only nn.Linear layers can be adapted here.")
        name = key.removeprefix(PREFIX)
        ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
        if ending is None:
            others[name] = tensor
            continue
        if ending == _REFERENCE_MAGNITUDE and tensor.dim() == 2:  # [out, 1]
            tensor = tensor.squeeze(1)
        modules.setdefault(name.removesuffix(ending), {})[_ENDINGS[ending]] = tensor
    copies = [name for name in others if name.removesuffix(_BASE_WEIGHT) in modules]
    base_weights = {name.removesuffix(_BASE_WEIGHT): others.pop(name) for name in copies}
    return modules, others, base_weights


def _part_biases(tensors: dict[str, Tensor], adapted: set[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the other tensors, and the biases by module: those whose module has no weight in the file.

    PEFT saves whatever has "bias" in its name, also buffers such as BART's ``final_logits_bias``, which no one trains.
    """
    extras, biases = {}, {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if name.endswith(BASE_BIAS) and name.removesuffix(BASE_BIAS) in adapted:
            biases[name.removesuffix(BASE_BIAS)] = tensor
        elif last == "bias" and f"{module}.weight" not in tensors:
            biases[module] = tensor
        elif not last.endswith("_bias") or any(other.startswith(f"{module}.") for other in tensors if other != name):
            extras[name] = tensor
    return extras, biases


def _refuse_strangers(extras: dict[str, Tensor], modules: Modules, folder: Path) -> None:
    for name in extras:
        if any(name.startswith(module + ".") for module in modules):
            raise AdapterError(f"{folder}: tensor {name!r} belongs to no adapter that these layers have.")


def _check_magnitudes(is_dora: bool, modules: Modules, folder: Path) -> None:
    having = sorted(name for name, tensors in modules.items() if "magnitude" in tensors)
    missing = sorted(set(modules) - set(having))
    if not is_dora and having:
        raise AdapterError(
            f"{folder}: {CONFIG_FILE} says use_dora false, but the file holds {len(having)} magnitudes (first "
            f"{having[0]}). Set use_dora to true if the adapter was trained with DoRA."
        )
    if is_dora and missing:
        raise AdapterError(
            f"{folder}: {CONFIG_FILE} asks for DoRA, but {len(missing)} modules have no magnitude (first "
            f"{missing[0]}). The file is incomplete; save the adapter again from the trained model."
        )


def _used_patterns(raw: dict[str, Any], field: str, names: Iterable[str]) -> list[tuple[str, Any]]:
    """Return the patterns that match a name; PEFT allows others, ``apply_adapters`` does not."""
    patterns = raw.get(field) or {}
    return [(key, value) for key, value in patterns.items() if any(value_for(n, {key: 1}, 0) for n in names)]
