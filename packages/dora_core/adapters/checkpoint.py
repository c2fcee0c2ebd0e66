"""Adapters on disk, in exactly PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_core.adapters.agreement import on_rank_0
from dora_core.adapters.config import AdapterConfig
from dora_core.adapters.inject import AdapterError, apply_adapters, value_for
from dora_core.adapters.linear import LoRALinear, scale_of
from dora_core.adapters.merge import adapted_layers
from dora_core.adapters.report import AdapterReport
from dora_core.adapters.sharded import full_shape, gathered
from dora_core.adapters.stored import BASE_BIAS, CONFIG_FILE, METADATA_KEY, PREFIX, SUFFIXES, WEIGHTS_FILE, read_adapter


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors on the CPU under PEFT's names. Every rank must call it (ZeRO-3).

    Per module: lora_A [r, in], lora_B [out, r], and with DoRA the magnitude [out]. A module that trains its
    magnitude alone gets zero factors of rank 1, with which PEFT computes the same function.
    """
    state: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model).items():
        tensors = {key: getattr(layer, key) for key in SUFFIXES}
        with gathered(tensor for tensor in tensors.values() if tensor is not None):
            if not layer.rank:
                tensors["lora_A"] = torch.zeros(1, layer.in_features)
                tensors["lora_B"] = torch.zeros(layer.out_features, 1)
            for key, tensor in tensors.items():
                if tensor is not None:
                    state[PREFIX + name + SUFFIXES[key]] = _on_cpu(tensor).float()
    for name, tensor in _extra_tensors(model).items():
        with gathered([tensor]):
            state[PREFIX + name] = _on_cpu(tensor)
    layers = adapted_layers(model)
    for name, bias in _lone_biases(model).items():
        with gathered([bias]):
            state[f"{PREFIX}{name}{BASE_BIAS if name in layers else '.bias'}"] = _on_cpu(bias)
    return state


def peft_config(model: nn.Module, config: AdapterConfig, base_model: str | None) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` for an adapted model."""
    magnitude_only = _magnitude_only(model)
    targets: list[str] | str = config.targets
    if magnitude_only:
        lists = isinstance(config.targets, list) and isinstance(config.magnitude_targets, list)
        targets = [*config.targets, *config.magnitude_targets] if lists else list(adapted_layers(model))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "exclude_modules": config.exclude or None,
        "rank_pattern": {**{re.escape(name): 1 for name in magnitude_only}, **config.rank_pattern},
        "alpha_pattern": config.alpha_pattern,
        "use_rslora": config.rslora,
        "use_dora": config.kind == "dora",
        "bias": config.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in _extra_tensors(model)}) or None,
    }


def save_adapter(model: nn.Module, config: AdapterConfig, folder: str | Path, base_model: str | None = None) -> Path:
    """Write the adapter of ``model`` to ``folder`` in PEFT's layout and return the folder.

    Every rank must call it; rank 0 writes. ``base_model`` is the folder or hub name that PEFT loads the base from.
    Raises ``ValueError`` on every rank if a file cannot be written.
    """
    state = adapter_state_dict(model)
    folder = Path(folder)
    own = {
        "magnitude_only": _magnitude_only(model),
        "norm_gradient": config.norm_gradient,
        "dropout_mode": config.dropout_mode,
    }

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(state, folder / WEIGHTS_FILE, {METADATA_KEY: json.dumps(own)})
        text = json.dumps(peft_config(model, config, base_model), indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    on_rank_0(write)
    return folder


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Raises ``OSError`` if it cannot be written; the file that was there is whole then."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        save_file(dict(tensors), temporary, {"format": "pt", **(metadata or {})})
        temporary.replace(path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written ({error}). Make room or check permissions, then write it again."
        ) from None


def load_adapter(model: nn.Module, folder: str | Path) -> tuple[AdapterConfig, AdapterReport | None]:
    """Put the adapter in ``folder`` into ``model``: one written here, by PEFT, or in the reference's own format.

    A model that is adapted already must have the same layers, ranks and scales, and must not be merged. Returns
    the configuration and, if layers were put in, the report. Raises ``AdapterError``, before any tensor is copied,
    on tensors that are missing, surplus or of another shape. Every rank must call it (ZeRO-3).
    """
    folder = Path(folder)
    stored = read_adapter(folder)
    report = None
    if not any(isinstance(module, LoRALinear) for module in model.modules()):
        report = apply_adapters(model, stored.config)
    layers = adapted_layers(model)
    extras = _extra_tensors(model)
    _compare("layers", set(layers), set(stored.modules), folder)
    _compare("tensors of modules_to_save", set(extras), set(stored.extras), folder)
    copies = [(extras[name], tensor, name) for name, tensor in stored.extras.items()]
    biases = _lone_biases(model)
    _compare("biases", set(biases), set(stored.biases), folder)
    copies += [(biases[name], tensor, f"{name}.bias") for name, tensor in stored.biases.items()]
    for name, layer in layers.items():
        own = {key: getattr(layer, key) for key in SUFFIXES if getattr(layer, key) is not None}
        given = stored.modules[name]
        _compare(f"tensors of {name}", set(own), set(given), folder)
        copies += [(parameter, given[key], f"{name}.{key}") for key, parameter in own.items()]
    for parameter, tensor, name in copies:
        _check_shape(parameter, tensor, name, folder)
    for name, layer in layers.items():
        _check_layer(name, layer, stored.config, folder)
    for name, tensor in stored.base_weights.items():
        _check_base_weight(name, layers[name], tensor, folder)
    for parameter, tensor, _ in copies:
        with torch.no_grad(), gathered([parameter], modify=True):
            parameter.copy_(tensor)
    for layer in layers.values():
        layer.invalidate()
    return stored.config, report


def _magnitude_only(model: nn.Module) -> list[str]:
    return [name for name, layer in adapted_layers(model).items() if not layer.rank]


def _extra_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what belongs to modules trained as they are, by name; a tied weight has several names."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_trained_as_it_is(module):
            state = module.state_dict(keep_vars=True)  # its buffers too, without those that are never saved
            tensors |= {f"{name}.{key}": tensor for key, tensor in state.items() if "." not in key}
    return tensors


def _lone_biases(model: nn.Module) -> dict[str, Tensor]:
    """Return by module the trained biases whose module is not trained as it is."""
    return {
        name: module.bias
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(getattr(module, "bias", None), nn.Parameter)
        and module.bias.requires_grad
        and not _is_trained_as_it_is(module)
    }


def _is_trained_as_it_is(module: nn.Module) -> bool:
    if isinstance(module, LoRALinear):
        return False
    own = dict(module.named_parameters(recurse=False))
    trained = {name for name, parameter in own.items() if parameter.requires_grad}
    return bool(trained) and trained != {"bias"}


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _check_shape(parameter: Tensor, tensor: Tensor, name: str, folder: Path) -> None:
    if full_shape(parameter) != tensor.shape:
        raise AdapterError(
            f"{folder}: {name} has shape {tuple(tensor.shape)}; this model needs {tuple(full_shape(parameter))}. The "
            "adapter belongs to another base model or rank."
        )


def _check_layer(name: str, layer: LoRALinear, config: AdapterConfig, folder: Path) -> None:
    if layer.merged:
        raise AdapterError(f"{name} is merged, so no adapter can be loaded into it. Call unmerge_adapters first.")
    scale = scale_of(layer.rank, value_for(name, config.alpha_pattern, config.alpha), config.rslora)
    if layer.scale != scale:
        raise AdapterError(
            f"{folder}: the adapter scales {name} by {scale:g}; this model's layer by {layer.scale:g}. Adapt the model "
            "with the file's alpha and rslora, or load into the base model."
        )


def _check_base_weight(name: str, layer: LoRALinear, tensor: Tensor, folder: Path) -> None:
    with gathered([layer.weight]):
        if layer.weight.shape != tensor.shape or not torch.equal(layer.weight.to(tensor.device, tensor.dtype), tensor):
            raise AdapterError(
                f"{folder}: the file holds a weight of {name} that is not this model's. Use the base model it was "
                "trained on."
            )


def _compare(what: str, expected: set[str], given: set[str], folder: Path) -> None:
    missing, surplus = sorted(expected - given), sorted(given - expected)
    if missing or surplus:
        shown = "; ".join(
            f"{label} {len(names)}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
            for label, names in (("missing", missing), ("surplus", surplus))
            if names
        )
        raise AdapterError(
            f"{folder}: the {what} do not fit the model ({shown}). Use the base model it was trained on, and a "
            "complete file."
        )
