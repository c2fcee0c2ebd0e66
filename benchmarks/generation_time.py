"""Time greedy generation with the adapter left unmerged: PEFT's and ours, next to the base model.

    python benchmarks/generation_time.py [--batches 1,16] [--variants peft-lora,ours-dora]

Each prompt is 32 random tokens, and exactly 128 new ones are generated with a key-value cache, in evaluation mode and
without gradients; ours within ``reuse_norms``. All variants take turns, ``--repeats`` times, because a host that
launches kernels for one sequence changes its pace within seconds; ratios are medians of those within a turn. A turn
before them does not count.
``peft-dora-cached`` is PEFT's DoRA within its ``DoraCaching``, which holds B A and the norms of all layers in memory.
Milliseconds are of a whole ``generate``, prompt included, by the host's clock with the GPU idle before and after. The
model and its adapters are those of ``step_time.py``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adapter_variants import DTYPES, TINY, VARIANTS, Shape, adapted, build_model
from measuring import RESULTS, Memory, figures_or_error, settings, synced, table, versions, write_json
from torch import Tensor, nn
from training_runs import iqr
from transformers import PreTrainedModel

DEFAULT_VARIANTS = "floor,peft-lora,peft-dora,peft-dora-cached,ours-lora,ours-dora"
COLUMNS = {
    "batch": "d",
    "variant": "",
    "median_ms": ".0f",
    "iqr_ms": ".0f",
    "ms_per_token": ".2f",
    "ratio_to_peft_lora": ".3f",
    "ratio_to_base": ".3f",
    "extra_gib": ".2f",
    "num_repeats": "d",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every batch size and variant; return 1 if one failed."""
    own = parse(arguments)
    device = torch.device(own.device)
    shape = Shape(own.layers, own.hidden, own.mlp, own.heads, own.vocab)
    model = build_model(shape, DTYPES[own.dtype], device).eval()
    rows: list[dict[str, Any]] = []
    for batch in map(int, own.batches.split(",")):
        rows += measure(model, batch, own, device)
        content = {"environment": versions(), "settings": settings(own), "rows": rows}
        write_json(own.output / f"{own.name}.json", content)
    print(table(rows, COLUMNS))
    return int(any("error" in row for row in rows))


def measure(model: PreTrainedModel, batch: int, own: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each variant; one that failed in a turn is left out of those that follow."""
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(3, model.config.vocab_size, (batch, own.prompt), generator=generator).to(device)
    turns: list[dict[str, dict[str, Any]]] = []
    failed: dict[str, dict[str, Any]] = {}
    for turn in range(1 + own.repeats):
        names = [name for name in own.variants.split(",") if name not in failed]
        turns.append({name: _once(model, name, prompts, own, device) for name in names})
        failed |= {name: found for name, found in turns[-1].items() if "error" in found}
        print(f"batch {batch}, turn {turn} of {own.repeats}: {turns[-1]}", flush=True)
    rows = []
    for name in turns.pop(0):
        row: dict[str, Any] = {"batch": batch, "variant": "base" if name == "floor" else name}
        if name in failed:
            rows.append(row | failed[name])
            continue
        times = [turn[name]["ms"] for turn in turns]
        row |= {"median_ms": statistics.median(times), "iqr_ms": iqr(times), "times_ms": times}
        row |= {"ms_per_token": row["median_ms"] / own.tokens, "num_repeats": own.repeats}
        row["extra_gib"] = turns[0][name]["extra_gib"]
        for other, key in (("peft-lora", "ratio_to_peft_lora"), ("floor", "ratio_to_base")):
            if other in turns[0] and other not in failed:
                row[key] = statistics.median(turn[name]["ms"] / turn[other]["ms"] for turn in turns)
        rows.append(row)
    return rows


def _once(
    model: PreTrainedModel, name: str, prompts: Tensor, own: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        with adapted(model, VARIANTS[name], own.rank) as called:
            called.eval()
            memory = Memory(device)
            _generate(called, prompts, min(8, own.tokens))  # kernels are chosen and compiled
            return {"ms": _generate(called, prompts, own.tokens), "extra_gib": memory.extra_gib()}

    return figures_or_error(work, device)


@torch.no_grad()
def _generate(called: nn.Module, prompts: Tensor, num_tokens: int) -> float:
    """Return the milliseconds that it takes to generate ``num_tokens`` after each of ``prompts`` [B, S]."""
    generate = partial(
        called.generate,
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        use_cache=True,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    result, taken = synced(generate, prompts.device)
    assert result.shape[1] == prompts.shape[1] + num_tokens
    return taken


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ``--tiny`` replaces sizes by some that a CPU does in seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,16", help="numbers of prompts, separated by commas")
    parser.add_argument("--variants", default=DEFAULT_VARIANTS)
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default="generation_time", help="of the file, without its ending")
    parser.add_argument("--tiny", action="store_true")
    own = parser.parse_args(arguments)
    if own.tiny:
        vars(own).update(vars(TINY), batches="1,2", rank=4, prompt=4, tokens=4, repeats=2, dtype="float32")
    return own


if __name__ == "__main__":
    sys.exit(main())
