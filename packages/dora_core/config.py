"""Recipes: strict YAML checked against frozen dataclasses, overridden by the command line, dumped for the run.

defaults < recipe (and its one optional ``base:``) < command line -> ``runs/<name>/config.yaml``.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, dataclass_transform

C = TypeVar("C")


class ConfigError(ValueError):
    """A recipe or a command line does not describe a valid configuration."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[C]) -> type[C]:
    """Make ``cls`` a frozen keyword-only dataclass that refuses unknown keys."""
    cls.__pydantic_config__ = {"extra": "forbid"}
    return dataclass(frozen=True, kw_only=True)(cls)


def require(ok: bool, name: str, given: Any, allowed: str, change: str = "") -> None:
    """Raise ``ValueError`` in three parts unless ``ok``: what was given, what is allowed, what to change."""
    if not ok:
        raise ValueError(f"{name} is {given!r}; it must be {allowed}. {change}".rstrip())


@section
class RunSection:
    """Where a run lives and what makes it repeatable."""

    name: str = "run"
    root: str = "runs"
    """The run folder is ``root/name``."""
    seed: int = 0
    resume: Literal["never", "auto", "must"] = "never"
    """never: the folder must hold no checkpoint; auto: resume if there is one; must: fail if there is none."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms (CUDA only; the CPU path is deterministic as it is)."""

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "run.name", self.name, "a folder name without '/'")


@section
class TrainSection:
    """One optimizer step takes ``global_batch_size`` rows: micro-batches x accumulation steps x ranks."""

    lr: float
    global_batch_size: int = 16
    micro_batch_size: int = 16
    """Rows per rank and forward pass; accumulation follows from the three numbers."""
    num_epochs: float = 3.0
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever ``num_epochs`` says."""
    optimizer: Literal["adamw", "adamw_foreach", "adamw_loop", "sgd"] = "adamw"
    """adamw is torch's fused AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applies to A, B and full weights of two or more dimensions; never to the magnitude unless asked for."""
    magnitude_lr: float | None = None
    """Learning rate of the magnitudes; ``lr`` if not given."""
    magnitude_weight_decay: float = 0.0
    b_lr_ratio: float = 1.0
    """Learning rate of B over that of A (LoRA+)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    warmup_ratio: float | None = None
    """Share of all steps; give this or ``warmup_steps``."""
    clip_grad_norm: float | None = 1.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of the frozen weights and of the computation; what is trained is kept in fp32."""
    gradient_checkpointing: bool = True
    eval_every: int | None = None
    """Evaluate the loss on the validation rows every this many steps, and at the end."""
    save_every: int | None = None
    keep_last: int = 2
    keep_best: bool = True
    """Also keep the checkpoint of the lowest validation loss, and export that one."""
    log_every: int = 10

    def __post_init__(self) -> None:
        require(self.lr > 0, "train.lr", self.lr, "positive")
        for name in ("global_batch_size", "micro_batch_size", "log_every", "keep_last"):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "a positive integer")
        for name in ("max_steps", "eval_every", "save_every"):
            given = getattr(self, name)
            require(given is None or given > 0, f"train.{name}", given, "a positive integer or absent")
        require(self.num_epochs > 0, "train.num_epochs", self.num_epochs, "positive")
        require(
            self.warmup_ratio is None or (0 <= self.warmup_ratio < 1 and self.warmup_steps == 0),
            "train.warmup_ratio",
            self.warmup_ratio,
            "in [0, 1), with train.warmup_steps at 0",
            "Give the warm-up once, as steps or as a ratio.",
        )
        require(
            self.clip_grad_norm is None or self.clip_grad_norm > 0,
            "train.clip_grad_norm",
            self.clip_grad_norm,
            "positive, or null for no clipping",
        )

    def accumulation(self, world_size: int) -> int:
        """Return micro-batches per optimizer step and rank; an error says which batch sizes would divide."""
        per_pass = self.micro_batch_size * world_size
        if self.global_batch_size % per_pass:
            usable = sorted(
                size
                for size in range(1, self.micro_batch_size + 1)
                if self.global_batch_size % (size * world_size) == 0
            )
            raise ConfigError(
                f"train.global_batch_size {self.global_batch_size} does not divide into micro-batches of "
                f"{self.micro_batch_size} rows on {world_size} ranks. "
                + (
                    f"Use train.micro_batch_size: {usable[-1]}."
                    if usable
                    else f"Use a train.global_batch_size that is a multiple of {world_size}."
                )
            )
        return self.global_batch_size // per_pass


@section
class LogSection:
    """Where metrics go beside ``metrics.jsonl``, which is always written."""

    tensorboard: bool = True
    wandb_project: str | None = None
    """Needs the extra ``wandb``."""
    progress: bool = True


@section
class DeepSpeedSection:
    """Which ZeRO mechanics to use."""

    config: str = "zero2"
    """A name from ``deepspeed_configs/`` or a path to a JSON file of ZeRO settings."""
    timeout_s: float = 1800.0
    """How long a collective may wait for the other ranks before the run stops."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Merged into ``zero_optimization``, for example {stage3_param_persistence_threshold: 0}."""


def load_config(cls: type[C], recipe: str | Path | None, overrides: Sequence[str] = (), *, recipes: Path) -> C:
    """Return ``cls`` built from a recipe and command-line overrides such as ``--train.lr 1e-4``.

    ``recipe`` is a file or the name of a file in the folder ``recipes``. Raises ``ConfigError`` with the file,
    the key's path and what is allowed.
    """
    raw: dict[str, Any] = {}
    where = "the defaults"
    if recipe is not None:
        path = find_recipe(recipe, recipes)
        raw, where = _read_with_base(path), str(path)
    merge_overrides(raw, overrides)
    return validate(cls, raw, where + (" with the command line" if overrides else ""))


def find_recipe(recipe: str | Path, recipes: Path) -> Path:
    """Return the file of a recipe given by path or by name."""
    from dora_core.registry import unknown_name

    for candidate in (Path(recipe), recipes / f"{recipe}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(path.stem for path in recipes.glob("*.yaml"))
    raise unknown_name(
        "recipe", str(recipe), names, f" Give one of these names or the path of a YAML file ({recipes})."
    )


def validate(cls: type[C], raw: dict[str, Any], where: str) -> C:
    """Return ``cls`` from plain data, or raise ``ConfigError`` that lists every mistake with its key."""
    import pydantic

    from dora_core.registry import unknown_name

    try:
        return pydantic.TypeAdapter(cls).validate_python(raw)
    except pydantic.ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                known = _fields_at(cls, problem["loc"][:-1])
                lines.append(
                    str(unknown_name("key", key, [".".join([*map(str, problem["loc"][:-1]), k]) for k in known]))
                )
            elif problem["type"] in ("missing", "missing_argument"):
                lines.append(f"{key} is required and has no default. Add it to the recipe or pass --{key} VALUE.")
            elif problem["type"] == "value_error":
                lines.append(str(problem["ctx"]["error"]))
            else:
                lines.append(f"{key} is {problem['input']!r}: {problem['msg']}.")
        raise ConfigError(f"{where}: " + "\n  ".join(lines)) from None


def dump_config(config: Any) -> str:
    """Return the YAML text of a configuration; ``load_config`` of it gives an equal object."""
    buffer = io.StringIO()
    _yaml().dump(_plain(config), buffer)
    return buffer.getvalue()


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML 1.2 file (1e-4 is a number; a key given twice is an error with its line)."""
    from ruamel.yaml import YAMLError

    try:
        raw = _yaml().load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; a recipe is a mapping of sections.")
    return raw


def merge_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Write ``--section.field value`` (or ``--section.field=value``) pairs into ``raw``; values are YAML."""
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(
                f"Unexpected argument {word!r}. Overrides read --section.field value, as --train.lr 1e-4."
            )
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"--{key} has no value. Write --{key} VALUE.")
            text = words.pop(0)
        from ruamel.yaml import YAMLError

        try:
            value = _yaml().load(text) if text.strip() else text
        except YAMLError as error:
            raise ConfigError(f"--{key} {text!r} is not a YAML value: {error}") from None
        node = raw
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--{key}: {parent} is a value, not a section.")
        node[last] = value


def split_arguments(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split a training script's arguments into the recipe of ``--config`` and the overrides that remain."""
    recipe, rest, words = None, [], list(argv)
    while words:
        word = words.pop(0)
        if word == "--config" or word.startswith("--config="):
            recipe = word.partition("=")[2] if "=" in word else (words.pop(0) if words else None)
            if not recipe:
                raise ConfigError("--config has no value. Write --config RECIPE or --config path/to/recipe.yaml.")
        elif word.startswith("--local_rank"):  # the deepspeed launcher adds it; LOCAL_RANK says the same
            if "=" not in word and words:
                words.pop(0)
        else:
            rest.append(word)
    return recipe, rest


def exit_with_message(error: Exception) -> None:
    """End the process as a user's mistake ends: one message on standard error, exit status 2, no traceback."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 120
    return yaml


def _read_with_base(path: Path) -> dict[str, Any]:
    raw = read_yaml(path)
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base is {base!r}; it must be the file name of one other recipe.")
    parent_path = path.parent / (base if base.endswith(".yaml") else base + ".yaml")
    if not parent_path.is_file():
        raise ConfigError(f"{path}: base {base!r} is not a file beside it ({parent_path}).")
    parent = read_yaml(parent_path)
    if "base" in parent:
        raise ConfigError(f"{path}: its base {parent_path.name} has a base itself. One level is the limit.")
    return _merge(parent, raw)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _fields_at(cls: Any, loc: tuple[Any, ...]) -> list[str]:
    import typing

    for part in loc:
        cls = typing.get_type_hints(cls)[part]
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
