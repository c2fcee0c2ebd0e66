"""Fine-tune and merge a LLaMA that does not fit one GPU: ZeRO-3 from shards on disk, with memory of GPUs and host.

    python benchmarks/sharded_model.py --rows data/commonsense --output runs/sharded [--parts write,train,merge]

Random bf16 weights are written layer by layer, a shard for each; the recipe ``llama_7b_dora_r32`` trains on them for
some steps under ZeRO-3 on all GPUs, and ``dora merge`` merges its adapter. Host memory is the peak, over the processes
of a part together, of memory of their own (``anonymous``) and of files mapped into it (``mapped``: above all pages of
the checkpoint, which count once for each process that has them, and which the kernel takes back when it needs them,
unless they are files in memory), sampled ten times a second. Writes ``sharded_model.json``, in which parts that are
left out keep what an earlier call found. ``--shape tiny`` tries it on CPU ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from llama_7b_training import write_shape
from measuring import write_json
from safetensors.torch import save_file
from training_runs import ROOT, environment, run_recipe
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {
    "65b": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the parts asked for, up to the first that fails; return 1 then."""
    own = parse(arguments)
    own.output.mkdir(parents=True, exist_ok=True)
    own.base, own.merged = own.base or own.output / "base", own.merged or own.output / "merged"
    file = own.output / "sharded_model.json"
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    content |= {"environment": environment(), "arguments": vars(own)}
    for part in own.parts.split(","):
        began = time.perf_counter()
        with host_memory(str(own.output), whole=part == "write") as memory:
            figures = PARTS[part](own)
        content[part] = {**figures, "seconds": time.perf_counter() - began, "host_gib": memory}
        write_json(file, content)
        if "error" in figures:
            break
    print(json.dumps(content, indent=1, default=str))
    return int("error" in figures)


def train(own: argparse.Namespace) -> dict[str, Any]:
    """Train on all GPUs; return the run's figures."""
    num_ranks = torch.cuda.device_count() or own.num_ranks
    overrides = {
        "model.path": own.base,
        "data.train": f"[{own.rows}]",
        "data.num_workers": 0,
        "deepspeed.config": "zero3",
        "train.global_batch_size": own.batch_size * num_ranks,
        "train.micro_batch_size": own.batch_size,
        "train.max_steps": own.steps,
        "train.eval_every": own.steps,
        "train.save_every": own.steps,
    }
    return run_recipe("llm", "llama_7b_dora_r32", overrides, own.output, "run", own.steps // 2, num_ranks)


def merge(own: argparse.Namespace) -> dict[str, Any]:
    """Merge the run's adapter by the command that users give."""
    command = [sys.executable, "-m", "dora_core.cli", "merge", "llm", "--base", str(own.base)]
    command += ["--adapter", str(own.output / "run" / "adapter"), "--output", str(own.merged)]
    done = subprocess.run(command, cwd=ROOT)
    return {"error": f"status {done.returncode}"} if done.returncode else {}


def write_base(own: argparse.Namespace) -> dict[str, Any]:
    """Write config, tokenizer and random bf16 weights, a shard for each layer; return the weights' size."""
    folder = own.base
    if not (folder / "config.json").is_file():
        write_shape(folder, "tiny", own.rows)
    sizes = {**SHAPES[own.shape], **({"num_hidden_layers": own.layers} if own.layers else {})}
    known = LlamaConfig.from_pretrained(folder)
    kept = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = LlamaConfig(**{name: getattr(known, name) for name in kept}, **sizes, dtype=torch.bfloat16)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).named_parameters()}
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        words = name.split(".")
        shards.setdefault(f"layer-{words[2]}" if words[1] == "layers" else "rest", {})[name] = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    num_bytes, weight_map = 0, {}
    for shard, members in shards.items():
        file = f"model-{shard}.safetensors"
        weight_map |= dict.fromkeys(members, file)
        tensors = {name: random_weight(shape, generator) for name, shape in members.items()}
        num_bytes += sum(tensor.numel() * 2 for tensor in tensors.values())
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return {"gib": num_bytes / 2**30, "num_layers": config.num_hidden_layers}


def random_weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return a weight of standard deviation 0.02, or the ones of a norm, on the CPU."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return weight.normal_(0, 0.02, generator=generator).cpu()


PARTS = {"write": write_base, "train": train, "merge": merge}


@contextmanager
def host_memory(word: str, whole: bool) -> Iterator[dict[str, float]]:
    """Give the peaks, in GiB, of all processes together that have ``word`` in their command; this too if ``whole``."""
    peaks = {"anonymous": 0.0, "mapped": 0.0}
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(0.1):
            sums = {"RssAnon": 0, "RssFile": 0, "RssShmem": 0}
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if not whole and folder.name == str(os.getpid()):
                        continue
                    if word not in (folder / "cmdline").read_text(errors="replace"):
                        continue
                    lines = (folder / "status").read_text().splitlines()
                except OSError:
                    continue
                for line in lines:
                    key, _, value = line.partition(":")
                    if key in sums:
                        sums[key] += int(value.split()[0])
            peaks["anonymous"] = max(peaks["anonymous"], sums["RssAnon"] / 2**20)
            peaks["mapped"] = max(peaks["mapped"], (sums["RssFile"] + sums["RssShmem"]) / 2**20)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        stopped.set()
        thread.join()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True, help="folder with <task>/train.json, or a file of rows")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="folder of the weights (OUTPUT/base); may be in memory, as /dev/shm")
    parser.add_argument("--merged", type=Path, help="folder of the merged model (OUTPUT/merged)")
    parser.add_argument("--shape", choices=SHAPES, default="65b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4, help="rows per GPU and step")
    parser.add_argument("--num-ranks", type=int, default=2, help="without a GPU")
    parser.add_argument("--parts", default="write,train,merge")
    own = parser.parse_args(arguments)
    unknown = set(own.parts.split(",")) - PARTS.keys()
    if unknown:
        parser.error(f"--parts has {', '.join(sorted(unknown))}; it can have {', '.join(PARTS)}.")
    return own


if __name__ == "__main__":
    raise SystemExit(main())
