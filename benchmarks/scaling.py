"""Weak scaling of the recipes' full 7B shapes on the GPUs of one machine, and the same losses on any number of them.

    python benchmarks/scaling.py --rows data/commonsense --output runs/scaling [--counts 1,2,4,8] [--parts speed,losses]

``speed``: ``llama_7b_dora_r32`` and ``llava15_7b_dora_r128`` in random bf16 weights under ZeRO-2 and ZeRO-3 with the
same tokens per GPU (packs; one conversation with many pictures): tokens/s per GPU, the efficiency against one GPU, peak
GiB, and the shares of three profiled steps in which NCCL runs at all and alone. ``losses``: the LLaMA shape in few
layers and fp32, the same global batch on each number of GPUs, against one GPU with another micro-batch (rounding
alone); and a run that goes on from its checkpoint on half as many GPUs. Writes ``scaling.json`` after each run, and
``scaling.png``; called again with other shapes, stages or numbers of GPUs, it measures what is missing there.
``--shape tiny`` tries it on CPU ranks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_7b_training
import llava_7b_training
import torch
from matplotlib.figure import Figure
from measuring import table, write_json
from training_runs import environment, run_recipe
from transformers import LlamaConfig, LlamaForCausalLM

from dora_core.training.metrics import read_metrics

PROFILED_STEP = 4
"""With the two after it among the steps of warm-up: a profile slows them down, and its end the next one."""
CHOICES = ("output", "counts", "parts", "shapes", "zero")
"""Arguments that say which rows there are, not how they are measured."""
COLUMNS = {
    "shape": "",
    "zero": "",
    "num_gpus": "d",
    "step_time_s": ".3f",
    "step_time_s_iqr": ".3f",
    "tokens_per_s_per_gpu": ",.0f",
    "efficiency": ".3f",
    "peak_gib": ".1f",
    "communication": ".1%",
    "exposed": ".1%",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; return 1 if a run failed, 2 if there are rows that cannot be compared with."""
    own = parse(arguments)
    own.output.mkdir(parents=True, exist_ok=True)
    llama, llava, data = prepare(own)
    file = own.output / "scaling.json"
    how = {"environment": environment(), **{key: value for key, value in vars(own).items() if key not in CHOICES}}
    how = json.loads(json.dumps(how, default=str))  # as it is read again
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"speed": [], "losses": []}
    if content.setdefault("how", how) != how:
        print(f"error: {file} has figures of other arguments or another machine. Give another --output.")
        return 2
    parts = {"speed": (speed, llama, llava, data), "losses": (losses, llama)}
    for part in own.parts.split(","):
        content[part] = [row for row in content[part] if "error" not in row]
        function, *shapes = parts[part]
        for row in function(own, list(content[part]), *shapes):
            content[part] = with_efficiency([*content[part], row])
            write_json(file, content)
            print(content[part][-1], flush=True)
    rows = [row for row in content["speed"] if "error" not in row]
    if rows:
        print(table(rows, COLUMNS))
        plot(rows, own.output / "scaling.png")
    return int(any("error" in row for row in content["speed"] + content["losses"]))


def prepare(own: argparse.Namespace) -> tuple[Path, Path, Path]:
    """Write the shapes' configurations, tokenizers and the rows with pictures; return their folders."""
    llama, llava, data = own.output / "llama", own.output / "llava", own.output / "pictures"
    if not (llama / "config.json").is_file():
        llama_7b_training.write_shape(llama, own.shape, own.rows)
    if not (data / "rows.json").is_file():
        drawn = data.with_name("drawn")  # renamed once it is whole
        llava_7b_training.write_rows(drawn, num_rows=2000, num_pictures=200)
        write_equal_conversations(drawn / "rows.json")
        drawn.rename(data)
    if not (llava / "config.json").is_file():
        llava_7b_training.write_shape(llava, own.shape, data)
    return llama, llava, data


def write_equal_conversations(file: Path) -> None:
    """Give all rows the conversation of the median length and a picture: every GPU has as many tokens in every step."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    by_length = sorted((row for row in rows if "image" in row), key=lambda row: len(json.dumps(row["conversations"])))
    median = by_length[len(by_length) // 2]
    pictures = itertools.cycle([row["image"] for row in by_length])
    equal = [{**median, "id": str(number), "image": next(pictures)} for number in range(len(rows))]
    file.write_text(json.dumps(equal), encoding="utf-8")


def speed(
    own: argparse.Namespace, known: list[dict[str, Any]], llama: Path, llava: Path, data: Path
) -> Iterator[dict[str, Any]]:
    """Yield a row for each shape, stage and number of GPUs that is not ``known``."""
    done = {(row["shape"], row["zero"], row["num_gpus"]) for row in known}
    packed = {"model.path": llama, "model.from_scratch": "true", "data.train": f"[{own.rows}]", "data.packing": "true"}
    packed |= {"data.pack_length": own.pack_length, "train.eval_every": own.steps}
    shapes = {
        "llama": ("llm", "llama_7b_dora_r32", 8, packed),
        "llava": ("vlm", "llava15_7b_dora_r128", 16, llava_7b_training.source(llava, data)),
    }
    for shape, zero, count in itertools.product(own.shapes.split(","), own.zero.split(","), own.counts):
        if (shape, zero, count) in done:
            continue
        pipeline, recipe, rows_per_gpu, overrides = shapes[shape]
        overrides = overrides | {
            "deepspeed.config": zero,
            "data.num_workers": own.workers,
            "train.micro_batch_size": rows_per_gpu,
            "train.global_batch_size": rows_per_gpu * count,
            "train.max_steps": own.steps,
            "train.save_every": own.steps,
            "log.profile_step": PROFILED_STEP if count > 1 else "null",  # one GPU does not communicate
            **dict(item.split("=", 1) for item in own.overrides),
        }
        name = f"{shape}-{zero}-{count}"
        figures = run_recipe(pipeline, recipe, overrides, own.output, name, own.warmup, count)
        row = {"shape": shape, "zero": zero, "num_gpus": count, **figures}
        if "tokens_per_s" in row:
            row["tokens_per_s_per_gpu"] = row["tokens_per_s"] / count
            if count > 1:
                profile = json.loads((own.output / name / "profile.json").read_text(encoding="utf-8"))
                row |= profile.get("device_shares", {})
        yield row


def losses(own: argparse.Namespace, rows: list[dict[str, Any]], llama: Path) -> Iterator[dict[str, Any]]:
    """Yield, for each way to split the same steps that is not in ``rows``, how far its losses are from one rank's."""
    small = own.output / "llama-small"
    if not (small / "config.json").is_file():
        write_small(llama, small)
    num_steps, batch_size = 40, 16
    base = {
        "model.path": small,
        "data.train": f"[{own.rows}]",
        "data.num_workers": own.workers,
        "adapter.dropout": 0,  # each rank and micro-batch draws masks of its own
        "train.precision": "fp32",
        "train.lr": 1e-3,
        "train.warmup_steps": 0,
        "train.global_batch_size": batch_size,
        "train.max_steps": num_steps,
        "train.eval_every": num_steps,
        "train.save_every": num_steps // 2,
        "run.deterministic": "true",
    }
    most = max(own.counts)
    ways = [("1 rank", 1, batch_size, {}), ("1 rank, other micro-batches", 1, batch_size // 4, {})]
    ways += [(f"{count} ranks, {zero}", count, batch_size // count, {"deepspeed.config": zero})
             for count in own.counts if count > 1 for zero in ("zero2", "zero3")]  # fmt: skip
    known: dict[str, list[float]] = {row["way"]: row["losses"] for row in rows}
    for title, count, micro, more in ways:
        if title in known:
            continue
        name = title.replace(" ", "-").replace(",", "")
        overrides = {**base, "train.micro_batch_size": micro, **more}
        figures = run_recipe("llm", "llama_7b_dora_r32", overrides, own.output, name, 1, count)
        yield compared(own.output / name, title, known, figures)
    title = f"{most} ranks, then {most // 2}"
    if most > 1 and title not in known:  # the first half of a run on all, the second on half of them
        name = f"{most}-ranks-zero2"
        store = own.output / name / "checkpoints"
        for path in sorted(store.glob("step-*"))[1:]:
            path.rename(path.with_name(f"later-{path.name}"))
        overrides = {**base, "train.micro_batch_size": batch_size // (most // 2), "run.resume": "must"}
        figures = run_recipe("llm", "llama_7b_dora_r32", overrides, own.output, name, 1, most // 2)
        yield compared(own.output / name, title, known, figures)


def write_small(shape: Path, folder: Path) -> None:
    """Write a LLaMA of this shape with random weights and at most 4 layers, and the tokenizer."""
    shutil.copytree(shape, folder)
    config = LlamaConfig.from_pretrained(shape)
    config.num_hidden_layers = min(4, config.num_hidden_layers)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def compared(run: Path, title: str, known: dict[str, list[float]], figures: dict[str, Any]) -> dict[str, Any]:
    """Return the losses of a run and their distance from the first run's."""
    if "error" in figures:
        return {"way": title, **figures}
    known[title] = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    first = next(iter(known.values()))
    apart = [abs(a - b) for a, b in zip(first, known[title], strict=True)]
    return {"way": title, "largest_difference": max(apart), "last_loss": known[title][-1], "losses": known[title]}


def with_efficiency(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with tokens/s per GPU over that of one GPU."""
    ones = {(row["shape"], row["zero"]): row.get("tokens_per_s") for row in rows if row.get("num_gpus") == 1}
    done = []
    for row in rows:
        one = ones.get((row.get("shape"), row.get("zero")))
        known = one and "tokens_per_s_per_gpu" in row
        done.append({**row, "efficiency": row["tokens_per_s_per_gpu"] / one} if known else row)
    return done


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the efficiency against the number of GPUs."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for shape, zero in dict.fromkeys((row["shape"], row["zero"]) for row in rows):
        chosen = [row for row in rows if (row["shape"], row["zero"]) == (shape, zero) and "efficiency" in row]
        counts = [row["num_gpus"] for row in chosen]
        axes.plot(counts, [row["efficiency"] for row in chosen], marker="o", label=f"{shape}, {zero}")
    axes.set(xlabel="GPUs", ylabel="tokens/s per GPU, 1 = one GPU", ylim=(0, 1.1))
    axes.legend()
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True, help="folder with <task>/train.json, or a file of rows")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", default="speed,losses")
    parser.add_argument("--counts", help="numbers of GPUs (1, 2, 4, 8 as far as there are so many)")
    parser.add_argument("--shapes", default="llama,llava")
    parser.add_argument("--zero", default="zero2,zero3")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=8, help="steps before those that count, at least 7")
    parser.add_argument("--pack-length", type=int, default=512, help="tokens of a packed row of the LLaMA shape")
    parser.add_argument("--workers", type=int, default=4, help="data workers of each rank")
    parser.add_argument("--shape", choices=llama_7b_training.SHAPES, default="7b")
    parser.add_argument("--overrides", nargs="*", default=[], help="further overrides of the speed runs, as key=value")
    own = parser.parse_args(arguments)
    available = torch.cuda.device_count() or os.cpu_count() or 1
    words = own.counts.split(",") if own.counts else [str(n) for n in (1, 2, 4, 8) if n <= available]
    own.counts = [int(word) for word in words]
    return own


if __name__ == "__main__":
    raise SystemExit(main())
