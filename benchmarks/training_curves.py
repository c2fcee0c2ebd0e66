"""Train a small LLaMA with DoRA on the plain and on the fused path, and compare the losses with noise.

    python benchmarks/training_curves.py [--steps 300] [--output benchmarks/results]

The data are sequences in which each token follows from the one before it in one of four ways, so that the loss falls
and not to zero. Noise is what rounding alone does: the plain path once more, with the rows of every batch in reverse
order. All runs start from the same weights and see the same batches; the base is in bf16, adapters in fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from adapter_variants import Shape, Variant, adapter_config, build_model
from measuring import RESULTS, versions, write_json

from dora_core.adapters import apply_adapters, reuse_norms

RUNS = {"plain": ("plain", False), "plain, rows reversed": ("plain", True), "fused": ("fused", False)}
SHAPE = Shape(layers=4, hidden=512, mlp=1376, heads=8, vocab=512)


def batches(num_steps: int, rows: int, length: int, device: torch.device) -> torch.Tensor:
    """Return token ids [steps, rows, length]."""
    generator = torch.Generator().manual_seed(1)
    ways = torch.randint(SHAPE.vocab, (SHAPE.vocab, 4), generator=generator)
    ids = [torch.randint(SHAPE.vocab, (num_steps, rows), generator=generator)]
    for _ in range(length - 1):
        ids.append(ways[ids[-1], torch.randint(4, ids[-1].shape, generator=generator)])
    return torch.stack(ids, -1).to(device)


def losses(kernel: str, reverse: bool, data: torch.Tensor, rank: int, lr: float) -> list[float]:
    """Return the loss of each step."""
    model = build_model(SHAPE, torch.bfloat16, data.device)
    apply_adapters(model, adapter_config(Variant(library="ours", kernel=kernel), rank))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    found = []
    with reuse_norms(model):
        for ids in data:
            ids = ids.flip(0) if reverse else ids
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
    return torch.stack(found).tolist()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all runs and write ``training_curves.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    own = parser.parse_args(arguments)
    data = batches(own.steps, own.rows, own.length, torch.device(own.device))
    curves = {name: losses(*run, data, own.rank, own.lr) for name, run in RUNS.items()}
    tail = slice(-max(1, own.steps // 10), None)
    plain = torch.tensor(curves["plain"])
    summary = {}
    for name, curve in curves.items():
        difference = torch.tensor(curve) - plain
        summary[name] = {
            "first_loss": curve[0],
            "last_tenth": torch.tensor(curve)[tail].mean().item(),
            "largest_difference_to_plain": difference.abs().max().item(),
            "rms_difference_to_plain": difference.square().mean().sqrt().item(),
        }
        print(f"{name:24}", "  ".join(f"{key} {value:.5f}" for key, value in summary[name].items()))
    settings = {key: value for key, value in vars(own).items() if key != "output"}
    write_json(
        own.output / "training_curves.json",
        {**versions(), "settings": settings | vars(SHAPE), "summary": summary, "losses": curves},
    )


if __name__ == "__main__":
    main()
