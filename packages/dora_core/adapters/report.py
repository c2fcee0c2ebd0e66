"""What became of a model: which modules were adapted and how many parameters train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from dora_core.adapters.groups import parameter_role
from dora_core.adapters.linear import LoRALinear
from dora_core.adapters.sharded import full_numel, full_shape


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
    kernels: str = ""
    """Which kernels the adapted layers use, and why."""

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
        if self.kernels:
            lines.append(f"kernels: {self.kernels}")
        return "\n".join(lines)


def describe_module(name: str, module: nn.Module, kind: str, rank: int = 0) -> AdaptedModule:
    """Return the report's line for one module: an adapted layer, or a module trained as it is."""
    inner = module.modules() if kind == "trainable" else (module,)
    owners = [m for m in inner if m is module or not isinstance(m, LoRALinear)]
    num = sum(full_numel(p) for m in owners for p in m.parameters(recurse=False) if p.requires_grad)
    weight = getattr(module, "weight", None)
    return AdaptedModule(name, kind, tuple(full_shape(weight)) if weight is not None else (), rank, num)


def report_on(model: nn.Module, modules: Iterable[AdaptedModule], kernels: str = "") -> AdapterReport:
    """Return the report on an adapted model; parameters that several modules share count once."""
    counts = {"low_rank": 0, "magnitude": 0, "other": 0}
    total = 0
    for name, parameter in model.named_parameters():
        total += full_numel(parameter)
        if parameter.requires_grad:
            counts[parameter_role(name)] += full_numel(parameter)
    return AdapterReport(tuple(modules), counts["low_rank"], counts["magnitude"], counts["other"], total, kernels)
