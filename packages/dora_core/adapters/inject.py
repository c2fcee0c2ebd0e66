"""Put adapters into a model: match patterns, refuse what cannot be merged rightly, report what was done."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable

import torch
from torch import nn

from dora_core.adapters.config import AdapterConfig
from dora_core.adapters.kernels import kernel_choice
from dora_core.adapters.kinds import train_in_full_precision, widen
from dora_core.adapters.linear import LoRALinear
from dora_core.adapters.report import AdapterReport, describe_module, report_on
from dora_core.adapters.sharded import full_shape
from dora_core.registry import ADAPTERS, unknown_name


class AdapterError(ValueError):
    """The adapter and the model do not fit; the message says what to change."""


def matches(name: str, patterns: list[str] | str) -> bool:
    """Whether a module name matches: the whole name against one regular expression, or a suffix of a list."""
    if isinstance(patterns, str):
        return bool(patterns) and re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def value_for(name: str, patterns: dict, default: float) -> float:
    """Return the value of the first suffix or regular expression that matches the end of ``name``, as PEFT does."""
    return next((value for key, value in patterns.items() if _ends_with(name, key)), default)


def apply_adapters(model: nn.Module, config: AdapterConfig) -> AdapterReport:
    """Freeze ``model``, put the adapters of ``config`` into it in place and return the report.

    Raises ``AdapterError``, before anything is changed, if a pattern matches nothing, a target is no plain
    ``nn.Linear``, a target's weight is shared with another module, a module is asked to be two things, or the model
    is adapted already; ``ValueError`` if ``config.kernel`` is fused where those kernels cannot run. Under ZeRO-3 every
    rank calls it; weights are gathered one at a time.
    """
    held = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    if held:
        raise AdapterError(
            f"The model is adapted already ({len(held)} layers, first {held[0]}). Start from the base model."
        )
    adapt = ADAPTERS.get(config.kind)
    low_rank = config.kind in ("lora", "dora")
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    eligible = {name: module for name, module in modules.items() if not matches(name, config.exclude)}
    targets = []
    if config.kind != "none":
        targets = _match(eligible, config.targets, "targets", _is_linear if low_rank else _owns_parameters)
    magnitudes = _match(eligible, config.magnitude_targets, "magnitude_targets", _is_linear)
    extras = _match(modules, config.trainable, "trainable", _holds_parameters)
    _refuse_overlap({"targets": targets, "magnitude_targets": magnitudes, "trainable": extras})
    if low_rank:
        _refuse_subclasses(eligible, config)
        _check_patterns(config, targets)
        _refuse_shared(modules, targets + magnitudes)
    kernels, kept, way = "", set(), "offload" if config.offload_kept_outputs else "keep"
    if low_rank:
        kept = {*_match(modules, config.kept_outputs, "kept_outputs", _is_linear)} & {*targets, *magnitudes}
        dtypes = {modules[name].weight.dtype for name in targets + magnitudes}
        kernels = kernel_choice(config.kernel, dtypes, config.dropout, config.dropout_mode)
        if config.kept_outputs:
            where = "on the GPU" if way == "keep" else "in the host's memory"
            effect = f"; where activations are checkpointed, the outputs of {len(kept)} layers are kept {where}"
            kernels += effect if kernels.startswith("fused") else "; so adapter.kept_outputs has no effect"
    model.requires_grad_(False)

    lines = []
    only_magnitude = set(magnitudes)
    for name in sorted(targets + magnitudes, key=list(modules).index):
        module = modules[name]
        rank = 0 if name in only_magnitude or not low_rank else int(value_for(name, config.rank_pattern, config.rank))
        alpha = float(value_for(name, config.alpha_pattern, config.alpha))
        adapted = adapt(module, config, rank, alpha, _generator(config.seed, name))
        if adapted is not module:
            adapted.recomputation = way if name in kept else "compute"
            adapted.train(module.training)
            model.set_submodule(name, adapted)
        lines.append(describe_module(name, adapted, "magnitude" if name in only_magnitude else config.kind, rank))
    for name in extras:
        for inner in modules[name].modules():
            if not isinstance(inner, LoRALinear):
                train_in_full_precision(inner.parameters(recurse=False))
        lines.append(describe_module(name, modules[name], "trainable"))
    train_in_full_precision(_biases(model, config))
    return report_on(model, lines, kernels)


def _biases(model: nn.Module, config: AdapterConfig) -> list[nn.Parameter]:
    """Return the biases that ``config.bias`` means; an error if there are none."""
    owners = {
        "none": {},
        "all": {name: module for name, module in model.named_modules() if not matches(name, config.exclude)},
        "lora_only": {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)},
    }[config.bias]
    owned = [own for own in (dict(m.named_parameters(recurse=False)) for m in owners.values()) if "bias" in own]
    if not owned and config.bias != "none":
        raise AdapterError(f"adapter.bias is {config.bias!r}, but there are no such biases. Set adapter.bias: none.")
    for own in owned:
        if "weight" in own and len(full_shape(own["weight"])) == 1:  # a norm takes weight and bias of one type
            widen(own["weight"])
    return [own["bias"] for own in owned]


def _match(modules: dict[str, nn.Module], patterns: list[str] | str, field: str, fits: Callable) -> list[str]:
    """Return the names that a pattern matches, in the model's order; every pattern must match one that fits."""
    candidates = [name for name, module in modules.items() if fits(module)]
    for pattern in [patterns] if isinstance(patterns, str) and patterns else patterns:
        one = pattern if isinstance(patterns, str) else [pattern]
        try:
            if any(matches(name, one) for name in candidates):
                continue
            others = [name for name in modules if matches(name, one)]
        except re.error as error:
            raise AdapterError(f"adapter.{field}: {pattern!r} is not a regular expression: {error}.") from None
        if others:
            needed = "an nn.Linear" if fits is _is_linear else "a module with parameters of its own"
            raise AdapterError(
                f"adapter.{field}: {pattern!r} matches {others[0]}, a {type(modules[others[0]]).__name__}; it must "
                f"match {needed}. Name one of: {', '.join(_last_parts(candidates))}."
            )
        raise AdapterError(
            f"adapter.{field}: {unknown_name('pattern', pattern, _last_parts(candidates))} "
            "A list holds suffixes of module names; a plain string is a regular expression for the whole name."
        )
    return [name for name in candidates if matches(name, patterns)]


def _ends_with(name: str, pattern: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def _owns_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _holds_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _check_patterns(config: AdapterConfig, targets: list[str]) -> None:
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns:
            try:
                found = any(_ends_with(name, key) for name in targets)
            except re.error as error:
                raise AdapterError(f"adapter.{field}: {key!r} is not a regular expression: {error}.") from None
            if not found:
                raise AdapterError(f"adapter.{field}: {unknown_name('pattern', key, _last_parts(targets))}")


def _refuse_overlap(fields: dict[str, list[str]]) -> None:
    holders: dict[str, str] = {}
    for field, names in fields.items():
        for name in names:
            if name in holders:
                raise AdapterError(
                    f"{name} matches {holders[name]} and {field}. A module takes one of the two; narrow a pattern."
                )
            holders[name] = field


def _refuse_subclasses(modules: dict[str, nn.Module], config: AdapterConfig) -> None:
    """Refuse quantised layers and those whose owner reads their weight without calling them."""
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and not _is_linear(module):
            for field in ("targets", "magnitude_targets"):
                if matches(name, getattr(config, field)):
                    raise AdapterError(
                        f"adapter.{field} matches {name}, a {type(module).__name__}; only plain nn.Linear layers can "
                        "be adapted. Narrow the pattern."
                    )


def _refuse_shared(modules: dict[str, nn.Module], names: list[str]) -> None:
    """Refuse targets whose weight another module uses: merging would change the other module as well."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name in names:
        others = [other for other in owners[id(modules[name].weight)] if other != name]
        if others:
            raise AdapterError(
                f"{name} shares its weight with {', '.join(others)} (tied weights or one layer used twice), so an "
                f"adapter on it could not be merged rightly. Leave {name} out of the targets, or untie them first."
            )


def _generator(seed: int, name: str) -> torch.Generator:
    # By name, not by order: the same layer starts the same whatever else is adapted, on every rank.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
