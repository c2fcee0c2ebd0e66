"""Time one DoRA training step as a plain torch loop and under the engine with ZeRO 0, 2 and 3, on one GPU.

    python benchmarks/zero_step_time.py [--regime 8x2048-ckpt-r32] [--layers 16] [--ways plain,zero2,zero3]

All ways do the same step on the same weights: forward, cross-entropy of whole fp32 logits, backward, clipping, fused
AdamW on fp32 adapters (as the engine keeps them), a frozen base in bf16. ``first_loss`` and ``last_loss`` must agree.
The plain loop comes first and again before ZeRO-3; ratios are to the mean of the two. ZeRO-3 must come last, since
DeepSpeed replaces ``torch.nn.functional.linear`` for the rest of the process. The plain loop never reads the gradient's
norm, which the engine does at every step. A process group of one rank is made if no launcher has made one.

What ZeRO-3's gathers take is stated twice. ``over_zero2_ms`` is its whole price, the difference of the medians.
``profile`` is one more step under ``torch.profiler``, after the timed ones: device milliseconds of all kernels, of
NCCL's, and of copies between places on the device. With one rank DeepSpeed uses a partition as it is, so gathers there
are bookkeeping on the CPU (``cpu_ms``) and hardly any device time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adapter_variants import TARGETS, TINY, Shape, build_model, checkpointed, disturb
from measuring import (
    RESULTS,
    Memory,
    Regime,
    figures_or_error,
    queueing_ms,
    settings,
    table,
    time_steps,
    versions,
    write_json,
)
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from training_runs import iqr
from transformers import PreTrainedModel

from dora_core.adapters import AdapterConfig, apply_adapters, reuse_norms
from dora_core.adapters.sharded import gathered
from dora_core.config import DeepSpeedSection, TrainSection
from dora_core.engine.build import DTYPES, build_engine, recipe_groups
from dora_core.engine.distributed import World
from dora_core.engine.optim import make_optimizer
from dora_core.engine.zero import resolve_zero
from dora_core.training.profiling import device_events

COLUMNS = {
    "way": "",
    "median_ms": ".1f",
    "iqr_ms": ".1f",
    "ratio_to_plain": ".3f",
    "over_zero2_ms": ".1f",
    "extra_gib": ".2f",
    "cpu_ms": ".1f",
    "first_loss": ".5f",
    "last_loss": ".5f",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every way; return 1 if one failed."""
    own = parse(arguments)
    world = World.start()
    rows: list[dict[str, Any]] = []
    for way in own.ways.split(","):
        row = {"way": way} | figures_or_error(partial(measure, way, own, world), world.device)
        rows = with_ratios([*rows, row])
        content = {"environment": versions(), "settings": settings(own), "rows": rows}
        write_json(own.output / f"{own.name}.json", content)
        print(rows[-1], flush=True)
    print(table(rows, COLUMNS))
    return int(any("error" in row for row in rows))


def measure(way: str, own: argparse.Namespace, world: World) -> dict[str, Any]:
    """Return the figures of one way."""
    regime = Regime.parse(own.regime)
    train = TrainSection(
        lr=1e-4,
        global_batch_size=regime.batch * world.size,
        micro_batch_size=regime.batch,
        precision=own.precision,
        schedule="constant",
        gradient_checkpointing=regime.checkpointing,
    )
    zero = resolve_zero(DeepSpeedSection(config="zero0" if way == "plain" else way), train, world)
    with zero.sharded_loading():
        shape = Shape(own.layers, own.hidden, own.mlp, own.heads, own.vocab)
        model = build_model(shape, DTYPES[own.precision], world.device)
    fill(model, world.device)
    apply_adapters(model, AdapterConfig(kind="dora", rank=regime.rank, alpha=2 * regime.rank, targets=TARGETS))
    disturb(model)
    batch = regime.input_ids(own.vocab, world.device)
    num_targets = regime.batch * (regime.tokens - 1) * world.size
    losses: list[Tensor] = []
    memory = Memory(world.device)
    loop = plain_loop if way == "plain" else engine_loop
    with checkpointed(model, regime.checkpointing):
        step, close = loop(model, batch, num_targets, train, zero, world, losses)
        with reuse_norms(model):
            milliseconds = time_steps(step, world.device, own.warmup, own.repeats)
            cpu_ms = queueing_ms(step, world.device)
            extra_gib = memory.extra_gib()
            facts = profiled(step, world.device)
        close()
    return {
        "median_ms": statistics.median(milliseconds),
        "iqr_ms": iqr(milliseconds),
        "cpu_ms": cpu_ms,
        "extra_gib": extra_gib,
        "first_loss": losses[0].item() / num_targets,
        "last_loss": losses[own.warmup + own.repeats - 1].item() / num_targets,
        "num_steps": own.repeats,
        "profile": facts,
    }


def loss_sum(called: Callable, input_ids: Tensor) -> Tensor:
    """Return the next-token cross-entropy summed over tokens [B, S]."""
    logits = called(input_ids=input_ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="sum")


def plain_loop(model: PreTrainedModel, batch, num_targets, train, zero, world, losses) -> tuple[Callable, Callable]:
    """Return a step of nothing but torch, and what ends it."""
    optimizer = make_optimizer(recipe_groups(model, train), train)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        loss = loss_sum(model, batch)
        (loss / num_targets).backward()
        losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, train.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, lambda: None


def engine_loop(model: PreTrainedModel, batch, num_targets, train, zero, world, losses) -> tuple[Callable, Callable]:
    """Return a step of our training loops, and what ends it."""
    engine = build_engine(model, recipe_groups(model, train), train, zero, world)

    def step() -> None:
        engine.begin_step(len(losses), 1000)
        loss = loss_sum(engine, batch)
        engine.backward(loss, num_targets)
        losses.append(loss.detach())
        engine.end_step()

    return step, engine.deepspeed.destroy


@torch.no_grad()
def fill(model: PreTrainedModel, device: torch.device) -> None:
    """Give a model the weights that follow from the order of its parameters alone, in partitions or not."""
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        with gathered([parameter], modify=True):
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)


def profiled(step: Callable[[], None], device: torch.device) -> dict[str, Any] | None:
    """Return what the device did in one step, in milliseconds; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as done:
        step()
        torch.cuda.synchronize()
    events = device_events(done)

    def total(*words: str) -> float:
        chosen = (event for event in events if not words or any(word in event[0].lower() for word in words))
        return sum(end - start for _, start, end in chosen) / 1e3

    return {
        "device_ms": total(),
        "nccl_ms": total("nccl"),
        "all_gather_ms": total("allgather", "all_gather"),
        "device_copies_ms": total("memcpy dtod"),
        "host_copies_ms": total("memcpy htod", "memcpy dtoh"),
        "num_device_events": len(events),
    }


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with their ratio to the plain loop (the mean of all its runs), and ZeRO-3's with what it adds."""
    plain = [row["median_ms"] for row in rows if row["way"] == "plain" and "median_ms" in row]
    second = next((row["median_ms"] for row in rows if row["way"] == "zero2" and "median_ms" in row), None)
    done = []
    for row in rows:
        if "median_ms" in row:
            row = {**row, "ratio_to_plain": row["median_ms"] / statistics.fmean(plain) if plain else None}
            if row["way"] == "zero3" and second is not None:
                row["over_zero2_ms"] = row["median_ms"] - second
        done.append(row)
    return done


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ``--tiny`` replaces sizes by some that a CPU does in seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", default="8x2048-ckpt-r32", help="ROWSxTOKENS[-ckpt]-rRANK")
    parser.add_argument("--ways", default="plain,zero0,zero2,plain,zero3")
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default="zero_step_time", help="of the file, without its ending")
    parser.add_argument("--tiny", action="store_true")
    own, _ = parser.parse_known_args(arguments)  # a launcher adds --local_rank
    if own.tiny:
        vars(own).update(vars(TINY), warmup=1, repeats=2, regime="2x32-ckpt-r4", precision="fp32")
    return own


if __name__ == "__main__":
    sys.exit(main())
