"""Adapters on disk, in exactly PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_core.adapters.config import AdapterConfig
from dora_core.adapters.inject import AdapterError, AdapterReport, apply_adapters, matches
from dora_core.adapters.linear import LoRALinear
from dora_core.adapters.merge import adapted_layers
from dora_core.adapters.sharded import full_shape, gathered

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
REFERENCE_WEIGHTS_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
MAGNITUDE_ONLY = "dora_magnitude_only"
_SUFFIXES = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
_REFERENCE_MAGNITUDE = ".weight_m_wdecomp.weight"
# PEFT options that change the function computed and that these layers do not have: value that means "not used".
_UNSUPPORTED = {
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
}


def adapter_state_dict(model: nn.Module, config: AdapterConfig) -> dict[str, Tensor]:
    """Return the adapter's tensors on the CPU under PEFT's names. Every rank must call it (ZeRO-3).

    Per module: lora_A [r, in], lora_B [out, r], and with DoRA the magnitude [out]. A module that trains its
    magnitude alone gets zero factors of rank 1, with which PEFT computes the same function.
    """
    state: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model).items():
        with gathered(layer.parameters(recurse=False)):
            tensors = {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "magnitude": layer.magnitude}
            if not layer.rank:
                tensors["lora_A"] = torch.zeros(1, layer.in_features)
                tensors["lora_B"] = torch.zeros(layer.out_features, 1)
            for key, tensor in tensors.items():
                if tensor is not None:
                    state[PREFIX + name + _SUFFIXES[key]] = tensor.detach().to("cpu", torch.float32, copy=True)
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        if parameter.requires_grad and _is_extra(module, config):
            with gathered([parameter]):
                state[PREFIX + name] = parameter.detach().to("cpu", copy=True)
    return state


def peft_config(model: nn.Module, config: AdapterConfig, base_model: str | None) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` for an adapted model."""
    layers = adapted_layers(model)
    magnitude_only = [name for name, layer in layers.items() if not layer.rank]
    targets: list[str] | str = config.targets
    if magnitude_only:
        lists = isinstance(config.targets, list) and isinstance(config.magnitude_targets, list)
        targets = [*config.targets, *config.magnitude_targets] if lists else list(layers)
    extras = [name for name, _ in model.named_modules() if name and matches(name, config.trainable)]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "rank_pattern": {**config.rank_pattern, **{_exact(name): 1 for name in magnitude_only}},
        "alpha_pattern": config.alpha_pattern,
        "use_rslora": config.rslora,
        "use_dora": config.kind == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": extras or None,
    }


def save_adapter(model: nn.Module, config: AdapterConfig, folder: str | Path, base_model: str | None = None) -> Path:
    """Write the adapter of ``model`` to ``folder`` in PEFT's layout and return the folder.

    Every rank must call it; rank 0 writes. ``base_model`` is the folder or hub name that PEFT loads the base from.
    """
    state = adapter_state_dict(model, config)
    folder = Path(folder)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        magnitude_only = [name for name, layer in adapted_layers(model).items() if not layer.rank]
        metadata = {"format": "pt"} | ({MAGNITUDE_ONLY: json.dumps(magnitude_only)} if magnitude_only else {})
        save_file(state, folder / WEIGHTS_FILE, metadata)
        text = json.dumps(peft_config(model, config, base_model), indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    return folder


def load_adapter(model: nn.Module, folder: str | Path) -> tuple[AdapterConfig, AdapterReport | None]:
    """Put the adapter in ``folder`` into ``model``: one written here, by PEFT, or in the reference's own format.

    A model that is adapted already must have the same layers. Returns the configuration and, if layers were put
    in, the report. Raises ``AdapterError`` on tensors that are missing, surplus or of another shape. Every rank
    must call it (ZeRO-3).
    """
    folder = Path(folder)
    raw = _read_config(folder)
    tensors, extras, magnitude_only = _read_tensors(folder)
    config = _to_config(raw, tensors, extras, magnitude_only, folder)
    report = None
    if not any(isinstance(module, LoRALinear) for module in model.modules()):
        report = apply_adapters(model, config)
    layers = adapted_layers(model)
    _compare("layers", set(layers), set(tensors), folder)
    for name, layer in layers.items():
        own = {key: getattr(layer, key) for key in _SUFFIXES if getattr(layer, key) is not None}
        given = dict(tensors[name])
        if name in magnitude_only:
            given = {"magnitude": given["magnitude"]}
        _compare(f"tensors of {name}", set(own), set(given), folder)
        for key, parameter in own.items():
            _copy(parameter, given[key], f"{name}.{key}", folder)
        layer.invalidate()
    parameters = dict(model.named_parameters())
    _compare("modules_to_save tensors", set(), set(extras) - set(parameters), folder)
    for name, tensor in extras.items():
        _copy(parameters[name], tensor, name, folder)
    return config, report


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{folder} holds no {CONFIG_FILE}. Give the folder that an adapter was saved to.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON: {error}. Save the adapter again.") from None
    if raw.get("peft_type") not in ("LORA", "DORA"):
        raise AdapterError(f"{path}: peft_type is {raw.get('peft_type')!r}; only LORA and DORA can be loaded.")
    for key, unused in _UNSUPPORTED.items():
        if key in raw and raw[key] not in unused and raw[key] is not None:
            raise AdapterError(f"{path}: {key} is {raw[key]!r}; these layers support only {unused[0]!r}.")
    return raw


def _read_tensors(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], set[str]]:
    """Return tensors by module and name, the modules_to_save tensors, and the modules of magnitude alone."""
    flat: dict[str, Tensor] = {}
    magnitude_only: set[str] = set()
    if (folder / WEIGHTS_FILE).is_file():
        try:
            with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
                magnitude_only = set(json.loads((file.metadata() or {}).get(MAGNITUDE_ONLY, "[]")))
                flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise AdapterError(f"{folder / WEIGHTS_FILE} cannot be read: {error}. Copy or save it again.") from None
    elif (folder / REFERENCE_WEIGHTS_FILE).is_file():
        flat = torch.load(folder / REFERENCE_WEIGHTS_FILE, map_location="cpu", weights_only=True)
    else:
        raise AdapterError(f"{folder} holds neither {WEIGHTS_FILE} nor {REFERENCE_WEIGHTS_FILE}.")
    modules: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for key, tensor in flat.items():
        if not key.startswith(PREFIX):
            raise AdapterError(
                f"{folder}: tensor {key!r} does not start with {PREFIX!r}, so it is not an adapter of PEFT's."
            )
        name = key.removeprefix(PREFIX)
        for own, suffix in (
            *_SUFFIXES.items(),
            ("magnitude", _REFERENCE_MAGNITUDE),
            ("magnitude", ".lora_magnitude_vector.weight"),
        ):
            if name.endswith(suffix):
                value = tensor.squeeze(1) if suffix == _REFERENCE_MAGNITUDE else tensor
                modules.setdefault(name.removesuffix(suffix), {})[own] = value
                break
        else:
            extras[name] = tensor
    magnitude_only |= {name for name, given in modules.items() if set(given) == {"magnitude"}}
    return modules, extras, magnitude_only


def _to_config(
    raw: dict[str, Any],
    tensors: dict[str, dict[str, Tensor]],
    extras: dict[str, Tensor],
    magnitude_only: set[str],
    folder: Path,
) -> AdapterConfig:
    is_dora = bool(raw.get("use_dora")) or raw["peft_type"] == "DORA"
    with_magnitude = {name for name, given in tensors.items() if "magnitude" in given}
    if not is_dora and with_magnitude:
        raise AdapterError(
            f"{folder}: {CONFIG_FILE} says use_dora false, but {len(with_magnitude)} magnitudes are in the file (first "
            f"{min(with_magnitude)}). Set use_dora to true if the adapter was trained with DoRA."
        )
    if is_dora and set(tensors) - with_magnitude:
        missing = sorted(set(tensors) - with_magnitude)
        raise AdapterError(
            f"{folder}: {CONFIG_FILE} asks for DoRA, but {len(missing)} modules have no magnitude (first {missing[0]}). The "
            "file is incomplete; save the adapter again from the trained model."
        )
    factored = sorted(set(tensors) - magnitude_only)
    ranks = {name: tensors[name]["lora_A"].shape[0] for name in factored if "lora_A" in tensors[name]}
    rank = int(raw.get("r", 8))
    # Without B-only tricks of PEFT's patterns: the file itself says which modules are adapted, and with what rank.
    targets = raw.get("target_modules")
    plain = not magnitude_only and not raw.get("exclude_modules") and raw.get("layers_to_transform") is None
    if not plain or targets is None or targets == "all-linear":
        targets = factored
    rank_pattern = {key: value for key, value in (raw.get("rank_pattern") or {}).items() if plain}
    if not plain:
        rank_pattern = {_exact(name): own for name, own in ranks.items() if own != rank}
    return AdapterConfig(
        kind="dora" if is_dora else "lora",
        rank=rank,
        alpha=float(raw.get("lora_alpha", 8)),
        rslora=bool(raw.get("use_rslora", False)),
        dropout=float(raw.get("lora_dropout", 0.0)),
        norm_gradient="full" if raw.get("dora_simple") is False else "detached",
        targets=targets,
        magnitude_targets=sorted(magnitude_only),
        trainable=sorted({name.rpartition(".")[0] for name in extras}),
        rank_pattern=rank_pattern,
        alpha_pattern={key: float(value) for key, value in (raw.get("alpha_pattern") or {}).items()},
    )


def _copy(parameter: nn.Parameter, tensor: Tensor, name: str, folder: Path) -> None:
    if full_shape(parameter) != tensor.shape:
        raise AdapterError(
            f"{folder}: {name} has shape {tuple(tensor.shape)}; this model needs {tuple(full_shape(parameter))}. The "
            "adapter belongs to another base model or rank."
        )
    with torch.no_grad(), gathered([parameter], modify=True):
        parameter.copy_(tensor)


def _compare(what: str, expected: set[str], given: set[str], folder: Path) -> None:
    missing, surplus = sorted(expected - given), sorted(given - expected)
    if missing or surplus:
        shown = "; ".join(
            f"{label} {len(names)}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
            for label, names in (("missing", missing), ("surplus", surplus))
            if names
        )
        raise AdapterError(
            f"{folder}: the {what} do not fit the model ({shown}). Use the base model it was trained on."
        )


def _is_extra(module: str, config: AdapterConfig) -> bool:
    parts = module.split(".")
    return any(matches(".".join(parts[:end]), config.trainable) for end in range(1, len(parts) + 1))


def _exact(name: str) -> str:
    return name.replace(".", r"\.")
