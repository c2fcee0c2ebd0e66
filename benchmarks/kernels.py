"""Time the fused kernels by themselves, and check the rule that picks the form of an adapted product.

    python benchmarks/kernels.py [--parts peaks,operators,forms,dense]
    TRITON_INTERPRET=1 python benchmarks/kernels.py --tiny --device cpu

``peaks``: a copy of 1 GiB of bf16 and a bf16 product of 8192^3, what the rest is measured by. ``operators``: each
operator of ``torch.ops.dora_core`` and the product x W^T, with the bytes of its operands and results over its time.
``forms``: forward and backward of one adapted linear layer, both merged, both composed, and each as the cost rule
picks; ``loss`` is the rule's time over the faster form's, less 1, and negative where a mixture is faster than either.
``dense``: the same for layers with a bias whose norm is differentiated, composed and with gradients from the weight's.

Times are of the device alone: every loop is queued behind a sleeping kernel (``hidden`` says whether that worked), over
as many copies of the operands as make four times the L2 cache, so operands come from memory as in a model. What one
call leaves for its own later kernels may be in the cache. Medians of 5 loops of 16 calls.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from device_timing import num_bytes, num_copies, time_calls
from kernel_forms import form_rows, summary
from measuring import GIB, RESULTS, figures_or_error, settings, table, versions, write_json
from torch import Tensor

import dora_core.adapters.kernels.fused  # noqa: F401  (registers the operators)

SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096)]
"""(in, out) of LLaMA-7B's layers."""
MORE_SHAPES = [(768, 768), (4096, 1024)]
DENSE_SHAPES = [(768, 768), (1024, 1024), (2048, 2048), (4096, 4096)]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COLUMNS = {
    "operator": "",
    "in": "d",
    "out": "d",
    "tokens": "d",
    "rank": "d",
    "adapters": "",
    "us": ".1f",
    "iqr_us": ".1f",
    "gb_per_s": ".0f",
    "share_of_copy": ".2f",
    "tflops": ".0f",
}
FORM_COLUMNS = {
    "in": "d",
    "out": "d",
    "tokens": "d",
    "rank": "d",
    "merged_us": ".1f",
    "composed_us": ".1f",
    "dense_us": ".1f",
    "rule_us": ".1f",
    "forward": "",
    "backward": "",
    "loss": ".1%",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts asked for; return 1 if something failed or the rule loses more than allowed."""
    own = parse(arguments)
    device = torch.device(own.device)
    content: dict[str, Any] = {"environment": versions(), "settings": settings(own), "peaks": {}, "operators": []}
    content |= {"forms": [], "forms_summary": {}, "dense": [], "dense_summary": {}}

    def save() -> None:
        write_json(own.output / f"{own.name}.json", content)

    if "peaks" in own.parts:
        content["peaks"] = peaks(own, device)
        save()
    if "operators" in own.parts:
        for row in operator_rows(own, device, content["peaks"].get("copy_gb_per_s")):
            content["operators"].append(row)
            save()
        print(table(content["operators"], COLUMNS))
    for part, shapes in (("forms", own.form_shapes), ("dense", own.dense_shapes)):
        if part not in own.parts:
            continue
        grid = itertools.product(shapes, own.form_ranks, own.form_tokens)
        for row in form_rows(grid, DTYPES[own.form_adapters], device, full_norm=part == "dense"):
            content[part].append(row)
            content[f"{part}_summary"] = summary(content[part])
            save()
        print(table(content[part], FORM_COLUMNS))
    summaries = [content["forms_summary"], content["dense_summary"]]
    print(content["peaks"], *summaries, sep="\n")
    failed = any("error" in row for row in content["operators"] + content["forms"] + content["dense"])
    return int(failed or any(each.get("num_above_limit", 0) > 0 for each in summaries))


def peaks(own: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return what a plain copy and a plain product reach."""
    source = torch.randn(own.copy_bytes // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    size = own.product_size
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    (copy,) = time_calls([lambda _: target.copy_(source)], 1, device)
    (product,) = time_calls([lambda _: torch.mm(left, right)], 1, device)
    return {
        "copy_us": copy.us,
        "copy_gb_per_s": 2 * own.copy_bytes / copy.us / 1e3,
        "product_us": product.us,
        "product_tflops": 2 * size**3 / product.us / 1e6,
    }


def operator_rows(own: argparse.Namespace, device: torch.device, copy_gb_per_s: float | None) -> Iterator[dict]:
    """Yield a row for each operator, shape, number of tokens where it has any, rank and type of adapters."""

    def measured(name: str, facts: dict[str, Any], adapters: str | None = None) -> dict[str, Any]:
        work = partial(_measured, name, facts, DTYPES.get(adapters), device, copy_gb_per_s)
        return {"operator": name, **facts} | figures_or_error(work, device)

    for in_features, out_features in own.shapes:
        size = {"in": in_features, "out": out_features}
        for tokens in own.tokens:
            yield measured("product x W^T", {**size, "tokens": tokens})
        for rank, adapters in itertools.product(own.ranks, own.adapters):
            facts = {**size, "rank": rank, "adapters": adapters}
            for name in ("row_norm", "effective_weight", "weight_gradients"):
                yield measured(name, facts, adapters)
            for tokens in own.tokens:
                for name in ("compose", "output_gradients merged", "output_gradients composed"):
                    yield measured(name, {**facts, "tokens": tokens}, adapters)


def _measured(
    name: str, facts: dict[str, Any], adapters: torch.dtype | None, device: torch.device, copy_gb_per_s: float | None
) -> dict[str, Any]:
    operands = _operands(name, facts, adapters, device)
    function = torch.mm if name.startswith("product") else getattr(torch.ops.dora_core, name.split(" ")[0])
    moved = num_bytes(operands, function(*operands))
    copies = [operands] + [
        tuple(value.clone() if torch.is_tensor(value) else value for value in operands)
        for _ in range(num_copies(moved, device) - 1)
    ]
    (found,) = time_calls([lambda index: function(*copies[index])], len(copies), device)
    rate = moved / found.us / 1e3
    figures = {**vars(found), "bytes": moved, "num_copies": len(copies), "gb_per_s": rate}
    figures["share_of_copy"] = rate / copy_gb_per_s if copy_gb_per_s else None
    if name.startswith("product"):
        figures["tflops"] = 2 * facts["tokens"] * facts["in"] * facts["out"] / found.us / 1e6
    return figures


def _operands(name: str, facts: dict[str, Any], adapters: torch.dtype | None, device: torch.device) -> tuple:
    """Return what the operator ``name`` takes, in the order of its signature."""

    def random(*shape: int, dtype: torch.dtype | None = torch.bfloat16, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=device)).to(dtype)

    in_features, out_features, tokens, rank = (facts.get(key, 0) for key in ("in", "out", "tokens", "rank"))
    if name.startswith("product"):
        return random(tokens, in_features), random(out_features, in_features, scale=0.02).t()
    lora_B = random(out_features, rank, dtype=adapters, scale=0.01)
    gain = (1 + torch.rand(out_features, device=device), 1 + torch.rand(out_features, device=device))
    if name in ("row_norm", "effective_weight", "weight_gradients"):
        weight = random(out_features, in_features, scale=0.02)
        low_rank = (weight, random(rank, in_features, dtype=adapters, scale=0.01), lora_B)
        if name == "row_norm":
            return *low_rank, 2.0
        if name == "effective_weight":
            return *low_rank, *gain, 2.0, torch.bfloat16
        gradient = random(out_features, in_features, dtype=torch.float32)
        return gradient, *low_rank, *gain, 2.0, True, torch.bfloat16
    hidden = random(tokens, rank)
    if name == "compose":
        return random(tokens, out_features), hidden, lora_B, *gain, None, 2.0
    merged = name.endswith("merged")
    dy, kept = (random(tokens, out_features) for _ in range(2))
    return dy, kept, hidden, lora_B, *gain, None, 2.0, merged, not merged


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ``--tiny`` replaces sizes by some that Triton's interpreter does on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="peaks,operators,forms,dense")
    parser.add_argument("--adapters", default="bfloat16,float32", help="types of A and B for the operators")
    parser.add_argument("--form-adapters", choices=DTYPES, default="float32", help="type of A and B for the forms")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default="kernels", help="of the file, without its ending")
    parser.add_argument("--tiny", action="store_true")
    own = parser.parse_args(arguments)
    own.parts, own.adapters = own.parts.split(","), own.adapters.split(",")
    own.copy_bytes, own.product_size = GIB, 8192
    own.shapes, own.tokens, own.ranks = SHAPES, [2048, 4096, 16384], [32, 128, 384]
    own.form_shapes, own.form_ranks = SHAPES + MORE_SHAPES, [8, 32, 128, 384]
    own.dense_shapes = DENSE_SHAPES
    own.form_tokens = [256, 1024, 2048, 4096, 16384]
    if own.tiny:
        own.copy_bytes, own.product_size = 1 << 20, 64
        own.shapes, own.tokens, own.ranks = [(32, 48)], [16], [8]
        own.form_shapes, own.form_ranks, own.form_tokens = [(32, 48)], [8], [16]
        own.dense_shapes = own.form_shapes
    return own


if __name__ == "__main__":
    sys.exit(main())
