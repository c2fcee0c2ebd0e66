"""Read what the original LLaVA repository writes: whole checkpoints, projectors, and LoRA or DoRA folders."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import LlamaConfig

from dora_core.adapters.agreement import on_rank_0
from dora_core.adapters.checkpoint import write_tensors
from dora_core.adapters.sharded import full_shape, gathered
from dora_core.config import ConfigError

MODEL_TYPES = ("llava", "llava_llama")
NON_LORA_FILE = "non_lora_trainables.bin"
PROJECTOR_FILE = "mm_projector.bin"

_PROJECTOR = re.compile(r"(?:.*\.)?mm_projector\.([02])\.(weight|bias)")
_PROJECTOR_LAYERS = {"0": "linear_1", "2": "linear_2"}
_TOWER = "model.vision_tower.vision_tower."
_PEFT = "base_model.model."
_OWN_MAGNITUDE = ".lora_magnitude_vector"
_MAGNITUDE = re.compile(r"(.*)\.weight_m_wdecomp(?:\.default)?\.weight")


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is one of the original repository's: it names its tower, and has no sub-configs."""
    return config.get("model_type") in MODEL_TYPES and "mm_vision_tower" in config


def require_llava15(config: Mapping[str, Any], path: str) -> None:
    """Raise ``ConfigError`` unless the checkpoint computes what LLaVA-1.5 does."""
    for key, allowed in (
        ("mm_projector_type", ("mlp2x_gelu",)),
        ("mm_vision_select_feature", ("patch", None)),
        ("mm_use_im_start_end", (False, None)),
    ):
        if config.get(key) not in allowed:
            raise ConfigError(
                f"{path}: {key} is {config.get(key)!r}; only {allowed[0]!r}, as in LLaVA-1.5, can be read. Use "
                "another checkpoint."
            )


def language_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Return the config of the language model inside an original checkpoint, without what is the repository's own."""
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "architectures"}
    return LlamaConfig(**{name: value for name, value in config.items() if name in known})


def local_folder(path: str) -> str:
    """Return ``path`` if it is a folder here, else the folder of a snapshot from the hub."""
    return path if Path(path).is_dir() else snapshot_download(path)


def read_projector(source: str) -> dict[str, Tensor]:
    """Return a projector's tensors under transformers' names, from ``mm_projector.bin`` or a whole checkpoint.

    Raises ``ConfigError`` unless there are exactly two layers with weight and bias (``mlp2x_gelu``).
    """
    found = {}
    for name, tensor in read_tensors(source, lambda name: _PROJECTOR.fullmatch(name) is not None).items():
        place, kind = _PROJECTOR.fullmatch(name).groups()
        found[f"{_PROJECTOR_LAYERS[place]}.{kind}"] = tensor
    expected = {f"{layer}.{kind}" for layer in _PROJECTOR_LAYERS.values() for kind in ("weight", "bias")}
    if set(found) != expected:
        raise ConfigError(
            f"{source} holds the projector tensors {sorted(found)}; it must hold {sorted(expected)} (in the file "
            "mm_projector.0 and .2). Give an mm_projector.bin of the type mlp2x_gelu."
        )
    return found


def write_projector(projector: nn.Module, folder: Path) -> None:
    """Write ``mm_projector.bin`` as LLaVA reads it. Every rank must call it; rank 0 writes.

    Raises ``ValueError`` on every rank if it cannot be written.
    """
    tensors = {}
    for place, layer in _PROJECTOR_LAYERS.items():
        for kind, parameter in getattr(projector, layer).named_parameters():
            with gathered([parameter]):
                tensors[f"model.mm_projector.{place}.{kind}"] = parameter.detach().to("cpu", copy=True)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(tensors, folder / PROJECTOR_FILE)
        except RuntimeError as error:  # torch's for a full disk
            raise OSError(f"{folder / PROJECTOR_FILE} could not be written ({error}). Make room for it.") from None

    on_rank_0(write)


def read_tower(path: str) -> dict[str, Tensor]:
    """Return the tower's tensors of an original checkpoint under transformers' names; none if it left them out."""
    found = read_tensors(local_folder(path), lambda name: name.startswith(_TOWER))
    return {name.removeprefix(_TOWER): tensor for name, tensor in found.items()}


def read_tensors(source: str, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return the tensors of a file, or of all weight files of a folder, whose names are ``wanted``, on the CPU.

    Pickled files are read as weights only. Raises ``ConfigError`` for what cannot be read.
    """
    root = Path(source)
    patterns = ("model*.safetensors", "pytorch_model*.bin", PROJECTOR_FILE)  # others, as training_args.bin, hold none
    files = [root] if root.is_file() else sorted(file for pattern in patterns for file in root.glob(pattern))
    if not files:
        raise ConfigError(f"{source} is neither a file of weights nor a folder of them. Give the path of one.")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    found |= {name: opened.get_tensor(name) for name in opened.keys() if wanted(name)}  # noqa: SIM118
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                found |= {name: tensor for name, tensor in tensors.items() if wanted(name)}
        except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError, AttributeError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(f"The weights in {file} cannot be read: {first} Copy the file again.") from None
    return found


@torch.no_grad()
def copy_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors by name into a module. Every rank must call it (ZeRO-3). Raises ``ConfigError`` for misfits."""
    own = dict(module.named_parameters())
    renamed = {_own_name(name, own): tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    for name, tensor in renamed.items():
        if name not in own or full_shape(own[name]) != tensor.shape:
            held = f"of shape {tuple(full_shape(own[name]))}" if name in own else "nowhere"
            raise ConfigError(
                f"The file's {name} has shape {tuple(tensor.shape)}; the {type(module).__name__} has it {held}. Use "
                "the files of one model."
            )
        with gathered([own[name]], modify=True):
            own[name].copy_(tensor)


def _own_name(name: str, own: Mapping[str, Any]) -> str:
    """Return the name without or with ``vision_model.``, whichever this version of transformers has."""
    short = name.removeprefix("vision_model.")
    return next((each for each in (name, short, f"vision_model.{short}") if each in own), name)


def is_original_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA or DoRA run of the original repository or of the DoRA authors' copy of it."""
    return (folder / NON_LORA_FILE).is_file() and (folder / "adapter_config.json").is_file()


def convert_adapter(folder: Path, output: Path) -> Path:
    """Write an original LoRA or DoRA folder in PEFT's layout, for ``LlavaForConditionalGeneration``; return ``output``.

    The factors come from ``adapter_model.bin``, the projector from ``non_lora_trainables.bin``, and so do DoRA's
    magnitudes, which the published script saves there and never reads back. Raises ``ConfigError`` if a module has
    factors and no magnitude.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if not {"r", "lora_alpha"} <= set(config) or config.get("bias", "none") != "none":
        raise ConfigError(
            f"{folder}/adapter_config.json has the fields {sorted(config)} and bias {config.get('bias')!r}; it must "
            "name r and lora_alpha and have bias none. Copy the file from the run."
        )
    files = [
        name for name in ("adapter_model.safetensors", "adapter_model.bin", NON_LORA_FILE) if (folder / name).is_file()
    ]
    state: dict[str, Tensor] = {}
    for name, tensor in {k: v for f in files for k, v in read_tensors(str(folder / f), _is_trained).items()}.items():
        state[_peft_name(name)] = tensor.flatten() if _MAGNITUDE.fullmatch(name) else tensor
    modules = {name.partition(".lora_A.")[0] for name in state if ".lora_A." in name}
    state = {  # magnitudes of modules without factors did nothing in that code
        name: tensor for name, tensor in state.items() if name.removesuffix(_OWN_MAGNITUDE) in modules | {name}
    }
    bare = sorted(name for name in modules if name + _OWN_MAGNITUDE not in state)
    is_dora = config.get("peft_type") == "DORA"
    if is_dora and bare:
        raise ConfigError(
            f"{folder} is a DoRA run, and {len(bare)} modules have no magnitude (first {bare[0]}), neither in the "
            f"adapter's file nor in {NON_LORA_FILE}. Copy both files from the run."
        )
    projector = sorted({name.removeprefix(_PEFT).rpartition(".")[0] for name in state if "projector" in name})
    written = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": sorted(name.removeprefix(_PEFT) for name in modules),
        "use_dora": is_dora,
        "bias": "none",
        "modules_to_save": projector or None,
    }
    output.mkdir(parents=True, exist_ok=True)
    write_tensors({name: tensor.contiguous() for name, tensor in state.items()}, output / "adapter_model.safetensors")
    (output / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return output


def _is_trained(name: str) -> bool:
    return ".lora_" in name or _MAGNITUDE.fullmatch(name) is not None or _PROJECTOR.fullmatch(name) is not None


def _peft_name(name: str) -> str:
    """Return the name of an original adapter's tensor in PEFT's layout on transformers' LLaVA."""
    inner = name.removeprefix(_PEFT)
    projector = _PROJECTOR.fullmatch(inner)
    if projector:
        place, kind = projector.groups()
        return f"{_PEFT}model.multi_modal_projector.{_PROJECTOR_LAYERS[place]}.{kind}"
    inner = re.sub(r"^model\.", "model.language_model.", inner).replace(".default.", ".")
    magnitude = _MAGNITUDE.fullmatch(inner)
    return f"{_PEFT}{magnitude[1]}{_OWN_MAGNITUDE}" if magnitude else f"{_PEFT}{inner}"
