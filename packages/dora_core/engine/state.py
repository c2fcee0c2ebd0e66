"""Trainable weights and optimizer moments by parameter name, whole, whatever the ZeRO stage or number of ranks."""

from __future__ import annotations

import deepspeed.utils as zero_utils
import torch
from torch import Tensor, nn

from dora_core.adapters.linear import LoRALinear
from dora_core.adapters.sharded import full_shape, gathered
from dora_core.engine.build import Engine


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gather_state(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Return (weights by name, moments by ``<name>/<moment>``, the optimizer's step count), on the CPU.

    Every rank must call it; parameters are gathered one at a time, and only rank 0 keeps them.
    """
    keys, count = _moments(engine)
    _link_moments(engine)
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}

    def keep(store: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        if engine.world.is_main:
            store[name] = tensor.detach().to("cpu", copy=True).contiguous()

    for name, parameter in trainable_parameters(engine.module).items():
        if engine.stage == 0:
            keep(weights, name, parameter)
            for key in keys:
                state = engine.optimizer.state.get(parameter, {})  # none if it never had a gradient
                keep(moments, f"{name}/{key}", state.get(key, torch.zeros_like(parameter)))
        else:
            keep(weights, name, zero_utils.safe_get_full_fp32_param(parameter))
            for key in keys:
                keep(moments, f"{name}/{key}", zero_utils.safe_get_full_optimizer_state(parameter, key))
    return weights, moments, count


@torch.no_grad()
def restore_state(engine: Engine, weights: dict[str, Tensor], moments: dict[str, Tensor], count: float) -> None:
    """Write what ``gather_state`` returned into a new engine. Every rank must call it with the same tensors.

    Raises ``ValueError`` if names or shapes are not this model's.
    """
    restore_weights(engine, weights)
    keys = sorted({name.rpartition("/")[2] for name in moments})
    if not keys:
        return
    _materialize_moments(engine, keys, count)
    for name, parameter in trainable_parameters(engine.module).items():
        for key in keys:
            moment = moments[f"{name}/{key}"].to(engine.world.device)
            if engine.stage == 0:
                engine.optimizer.state[parameter][key].copy_(moment)
            else:
                zero_utils.safe_set_full_optimizer_state(parameter, moment, key)


@torch.no_grad()
def restore_weights(engine: Engine, weights: dict[str, Tensor]) -> None:
    """Write trained weights by name into the engine's model. Every rank must call it with the same tensors.

    Raises ``ValueError`` if names or shapes are not this model's.
    """
    parameters = trainable_parameters(engine.module)
    if set(parameters) != set(weights):
        missing, surplus = sorted(set(parameters) - set(weights)), sorted(set(weights) - set(parameters))
        raise ValueError(
            f"The checkpoint trains other parameters than this configuration (missing {missing[:3]}, surplus "
            f"{surplus[:3]}). Resume with the configuration it was written by, or start a new run."
        )
    for name, parameter in parameters.items():
        value = weights[name].to(engine.world.device)
        if full_shape(parameter) != value.shape:
            raise ValueError(
                f"The checkpoint's {name} has shape {tuple(value.shape)}, this configuration's "
                f"{tuple(full_shape(parameter))}. Resume with the configuration it was written by."
            )
        with gathered([parameter], modify=True):
            parameter.copy_(value)
        if engine.stage > 0:
            zero_utils.safe_set_full_fp32_param(parameter, value)
    for module in engine.module.modules():
        if isinstance(module, LoRALinear):
            module.invalidate()


def _moments(engine: Engine) -> tuple[list[str], float]:
    """Return the names of the optimizer's per-element state and its step count; nothing before the first step."""
    for state in engine.optimizer.state.values():
        keys = sorted(key for key, value in state.items() if torch.is_tensor(value) and value.dim() > 0)
        return keys, float(state.get("step", 0.0))
    return [], 0.0


def _materialize_moments(engine: Engine, keys: list[str], count: float) -> None:
    """Create the optimizer's state as its first step would."""
    wrapper, optimizer = engine.deepspeed.optimizer, engine.optimizer
    if engine.stage == 3:
        tensors = wrapper.fp32_partitioned_groups_flat
    else:  # in stages 1 and 2 the groups hold the flat partitions, in stage 0 the parameters themselves
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for tensor in tensors:
        step_device = tensor.device if optimizer.defaults.get("fused") else "cpu"
        optimizer.state[tensor] = {
            "step": torch.tensor(count, dtype=torch.float32, device=step_device),
            **{key: torch.zeros_like(tensor) for key in keys},
        }
    _link_moments(engine)


def _link_moments(engine: Engine) -> None:
    # DeepSpeed links moments to parameters once, in the middle of its first step, when only the first parameter group
    # has any; the others would never be found.
    if engine.stage in (1, 2):
        engine.deepspeed.optimizer._hp_optimizer_states_linked = False
        engine.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
