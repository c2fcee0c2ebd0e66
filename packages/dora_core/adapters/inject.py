"""Put adapters into a model: match patterns, refuse what cannot be merged rightly, report what was done."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dora_core.adapters.config import AdapterConfig
from dora_core.adapters.kinds import train_in_full_precision
from dora_core.adapters.linear import LoRALinear
from dora_core.adapters.sharded import full_numel, full_shape
from dora_core.registry import ADAPTERS, unknown_name


class AdapterError(ValueError):
    """The adapter and the model do not fit; the message says what to change."""


@dataclass(frozen=True)
class AdaptedModule:
    """One line of the report: a module, what became of it and how many of its parameters train."""

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    num_trainable: int


@dataclass(frozen=True)
class AdapterReport:
    """What ``apply_adapters`` did; ``str`` gives a table."""

    modules: tuple[AdaptedModule, ...]
    num_low_rank: int
    """Elements of A and B."""
    num_magnitude: int
    num_other: int
    """Other trainable elements: full weights and ``trainable`` extras."""
    num_total: int
    """Elements of the model, adapters included."""

    @property
    def num_trainable(self) -> int:
        """Trainable elements."""
        return self.num_low_rank + self.num_magnitude + self.num_other

    @property
    def share(self) -> float:
        """Trainable elements over all elements, adapters included (the papers' #Params)."""
        return self.num_trainable / max(1, self.num_total)

    def __str__(self) -> str:
        rows: dict[tuple[str, str, tuple[int, ...], int], list[int]] = {}
        for module in self.modules:
            key = (module.name.rsplit(".", 1)[-1], module.kind, module.shape, module.rank)
            rows.setdefault(key, []).append(module.num_trainable)
        lines = [f"{'module':<24}{'kind':<12}{'shape':<18}{'rank':>5}{'count':>7}{'trainable':>16}"]
        for (name, kind, shape, rank), counts in rows.items():
            size = " x ".join(map(str, shape))
            lines.append(f"{name:<24}{kind:<12}{size:<18}{rank or '-':>5}{len(counts):>7}{sum(counts):>16,}")
        lines.append(
            f"trainable {self.num_trainable:,} of {self.num_total:,} ({100 * self.share:.3f} %): A and B "
            f"{self.num_low_rank:,}, magnitudes {self.num_magnitude:,}, other {self.num_other:,}"
        )
        return "\n".join(lines)


def matches(name: str, patterns: list[str] | str) -> bool:
    """Whether a module name matches: the whole name against one regular expression, or a suffix of a list."""
    if isinstance(patterns, str):
        return bool(patterns) and re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def value_for(name: str, patterns: dict, default: float) -> float:
    """Return the value of the first suffix or regular expression that matches the end of ``name``, as PEFT does."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def apply_adapters(model: nn.Module, config: AdapterConfig) -> AdapterReport:
    """Freeze ``model``, put the adapters of ``config`` into it in place and return the report.

    Raises ``AdapterError`` if a pattern matches nothing, a target is no ``nn.Linear``, a target's weight is shared
    with another module, or the model is adapted already. Under ZeRO-3 every rank calls it; weights are gathered
    one at a time.
    """
    held = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    if held:
        raise AdapterError(
            f"The model is adapted already ({len(held)} layers, first {held[0]}). Start from the base model."
        )
    adapt = ADAPTERS.get(config.kind)
    low_rank = config.kind in ("lora", "dora")
    is_target = (lambda m: isinstance(m, nn.Linear)) if low_rank else _owns_parameters
    modules = {name: module for name, module in model.named_modules() if name}
    targets = [] if config.kind == "none" else _match(modules, config.targets, "targets", is_target)
    magnitudes = _match(modules, config.magnitude_targets, "magnitude_targets", lambda m: isinstance(m, nn.Linear))
    extras = _match(modules, config.trainable, "trainable", lambda m: any(True for _ in m.parameters()))
    both = sorted(set(targets) & set(magnitudes))
    if both:
        raise AdapterError(
            f"{both[0]} matches targets and magnitude_targets. A module takes one of the two; narrow a pattern."
        )
    if low_rank:
        _check_patterns(config, targets)
        _refuse_shared(model, targets + magnitudes)
    model.requires_grad_(False)

    lines = []
    for name in sorted(targets + magnitudes, key=list(modules).index):
        module = modules[name]
        only_magnitude = name in set(magnitudes)
        rank = 0 if only_magnitude or not low_rank else int(value_for(name, config.rank_pattern, config.rank))
        alpha = float(value_for(name, config.alpha_pattern, config.alpha))
        adapted = adapt(module, config, rank, alpha, _generator(config.seed, name))
        if adapted is not module:
            adapted.train(module.training)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, adapted)
        lines.append(_line(name, adapted, "magnitude" if only_magnitude else config.kind, rank))
    for name in extras:
        for inner in modules[name].modules():
            if not isinstance(inner, LoRALinear):
                train_in_full_precision(inner)
        lines.append(_line(name, modules[name], "trainable", 0))
    return _report(model, lines)


def _report(model: nn.Module, lines: list[AdaptedModule]) -> AdapterReport:
    counts = {"low_rank": 0, "magnitude": 0, "other": 0}
    total = 0
    for name, parameter in model.named_parameters():
        total += full_numel(parameter)
        if parameter.requires_grad:
            counts[parameter_role(name)] += full_numel(parameter)
    return AdapterReport(tuple(lines), counts["low_rank"], counts["magnitude"], counts["other"], total)


def parameter_role(name: str) -> str:
    """Return low_rank, magnitude or other for a parameter's name."""
    last = name.rsplit(".", 1)[-1]
    return "low_rank" if last in ("lora_A", "lora_B") else "magnitude" if last == "magnitude" else "other"


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    magnitude_lr: float | None = None,
    magnitude_weight_decay: float = 0.0,
    b_lr_ratio: float = 1.0,
    other_lr: float | None = None,
) -> list[dict]:
    """Return optimizer groups of the trainable parameters: A, B, magnitude, other, and other of one dimension.

    ``weight_decay`` applies to A, B and other weights of two or more dimensions; the magnitude has its own, zero
    unless asked for (decay pulls m towards 0, not towards the base). ``b_lr_ratio`` is LoRA+'s. Empty groups are
    left out; each group has a ``name``.
    """
    options = {
        "A": {"lr": lr, "weight_decay": weight_decay},
        "B": {"lr": lr * b_lr_ratio, "weight_decay": weight_decay},
        "magnitude": {"lr": lr if magnitude_lr is None else magnitude_lr, "weight_decay": magnitude_weight_decay},
        "other": {"lr": lr if other_lr is None else other_lr, "weight_decay": weight_decay},
        "other_1d": {"lr": lr if other_lr is None else other_lr, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in options}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = parameter_role(name)
        if role == "low_rank":
            role = name[-1]
        elif role == "other" and len(full_shape(parameter)) < 2:
            role = "other_1d"
        members[role].append(parameter)
    return [{"name": name, "params": members[name], **options[name]} for name in options if members[name]]


def _match(modules: dict[str, nn.Module], patterns: list[str] | str, field: str, fits: Callable) -> list[str]:
    candidates = [name for name, module in modules.items() if fits(module)]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not pattern:
            continue
        one = pattern if isinstance(patterns, str) else [pattern]
        try:
            if any(matches(name, one) for name in candidates):
                continue
            others = [name for name in modules if matches(name, one)]
        except re.error as error:
            raise AdapterError(f"adapter.{field}: {pattern!r} is not a regular expression: {error}.") from None
        if others:
            raise AdapterError(
                f"adapter.{field}: {pattern!r} matches {others[0]}, a {type(modules[others[0]]).__name__}, which cannot "
                f"be adapted that way; only nn.Linear modules can. Name one of: {_last_parts(candidates)}."
            )
        raise AdapterError(
            f"adapter.{field}: {unknown_name('pattern', pattern, _last_parts(candidates))} "
            "A list holds suffixes of module names; a plain string is a regular expression for the whole name."
        )
    return [name for name in candidates if matches(name, patterns)]


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _owns_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _check_patterns(config: AdapterConfig, targets: list[str]) -> None:
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns:
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in targets):
                raise AdapterError(f"adapter.{field}: {unknown_name('pattern', key, _last_parts(targets))}")


def _refuse_shared(model: nn.Module, names: list[str]) -> None:
    """Refuse targets whose weight another module uses: merging would change the other module as well."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name in names:
        weight = model.get_submodule(name).weight
        others = [other for other in owners[id(weight)] if other != name]
        if others:
            raise AdapterError(
                f"{name} shares its weight with {', '.join(others)} (tied weights or one layer used twice), so an adapter "
                f"on it could not be merged rightly. Leave {name} out of the targets, or untie the weights first."
            )


def _generator(seed: int, name: str) -> torch.Generator:
    # By name, not by order: the same layer starts the same whatever else is adapted, on every rank.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _line(name: str, module: nn.Module, kind: str, rank: int) -> AdaptedModule:
    recurse = kind == "trainable"
    num = sum(full_numel(p) for p in module.parameters(recurse=recurse) if p.requires_grad)
    weight = getattr(module, "weight", None)
    return AdaptedModule(name, kind, tuple(full_shape(weight)) if weight is not None else (), rank, num)
