"""What the distributed tests run on each rank: a tiny LLaMA for some steps, as the training loop does."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from dora_core.adapters import AdapterConfig, apply_adapters, checkpoint_activations, parameter_groups, reuse_norms
from dora_core.adapters.dora_linear import DoRALinear
from dora_core.config import DeepSpeedSection, TrainSection
from dora_core.engine.build import DTYPES, Engine, build_engine
from dora_core.engine.distributed import World
from dora_core.engine.zero import resolve_zero
from dora_core.training.progress import Progress

VOCAB, BATCH, LENGTH = 64, 8, 16
# With the usual thresholds a tiny model is never released after the first step, which hides every ZeRO-3 mistake.
RELEASE_ALWAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def write_model(folder: Path) -> None:
    """Save a LLaMA of two layers with random fp32 weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_engine(world: World, folder: Path, case: dict[str, Any]) -> Engine:
    """Return an engine as ``case`` says: stage, precision, accumulation, optimizer, adapter, checkpointing."""
    stage = case.get("stage", 0)
    train = TrainSection(
        lr=1e-2,
        global_batch_size=BATCH,
        micro_batch_size=BATCH // world.size // case.get("accumulation", 1),
        precision=case.get("precision", "fp32"),
        optimizer=case.get("optimizer", "adamw"),
    )
    zero = resolve_zero(
        DeepSpeedSection(config=f"zero{stage}", extra=RELEASE_ALWAYS if stage == 3 else {}), train, world
    )
    with zero.sharded_loading():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[train.precision], attn_implementation="sdpa")
    default = {"kind": "dora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj"]}
    adapter = AdapterConfig(**{**default, **case.get("adapter", {})})
    apply_adapters(model, adapter)
    if case.get("checkpointing"):
        checkpoint_activations(model, adapter)
    model.train()
    return build_engine(model, parameter_groups(model, train.lr), train, zero, world)


def train_steps(engine: Engine, start: int, stop: int, *, reuse: bool = True) -> list[float]:
    """Train optimizer steps start to stop (of 20) on rows drawn by step; return the mean losses over all ranks."""
    world, losses = engine.world, []
    with reuse_norms(engine.module) if reuse else nullcontext():
        for step in range(start, stop):
            engine.begin_step(step, 20)
            rows = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
            share = BATCH // world.size
            targets = BATCH * (LENGTH - 1)
            total = 0.0
            for batch in rows[world.rank * share : (world.rank + 1) * share].chunk(engine.accumulation):
                logits = engine(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
                loss = F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
                engine.backward(loss, targets)
                total += loss.item()
            _, applied = engine.end_step()
            assert applied
            losses.append(world.sum([total])[0] / targets)
    return losses


def num_norms(engine: Engine) -> list[int]:
    """Return how often each DoRA layer has computed its norm."""
    return [layer.num_norms_computed for layer in engine.module.modules() if isinstance(layer, DoRALinear)]


def progress_at(step: int) -> Progress:
    """Return the progress of a run at a step."""
    return Progress(step=step, num_tokens=100 * step, num_targets=90 * step)
