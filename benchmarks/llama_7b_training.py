"""Train the full LLaMA-7B shape in random bf16 weights for some steps: ZeRO-2 and ZeRO-3, padded and packed.

    python benchmarks/llama_7b_training.py --rows data/commonsense --output runs/bench [--steps 40]

Runs ``deepspeed pipelines/llm/train.py --config llama_7b_dora_r32`` once per setting, on all GPUs, with a tokenizer
trained on the rows. Writes ``results.json``, ``results.md`` and ``loss.png``. Speed is the median over the steps after
``--warmup``; real tokens leave padding out. ``--shape tiny`` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from training_runs import environment, run_recipe
from transformers import LlamaConfig

from dora_core.data.rows import read_rows
from dora_core.testing.tiny import train_tokenizer
from dora_core.training.metrics import plot_losses
from pipelines.llm.data import render

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True, help="folder with <task>/train.json, or a file of rows")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--settings", default="zero2,zero2-packed256,zero3,zero3-packed256")
    parser.add_argument("--overrides", nargs="*", default=[], help="further overrides of the recipe, as key=value")
    own = parser.parse_args()
    own.output.mkdir(parents=True, exist_ok=True)
    model = own.output / "shape"
    if not (model / "config.json").is_file():
        write_shape(model, own.shape, own.rows)
    results = []
    for setting in own.settings.split(","):
        zero, _, packing = setting.partition("-packed")
        pack_length = int(packing or 256) if "-packed" in setting else None
        results.append({"setting": setting, **run(own, model, setting, zero, pack_length)})
        text = json.dumps(
            {"environment": environment(), "arguments": vars(own), "runs": results}, indent=2, default=str
        )
        (own.output / "results.json").write_text(text + "\n", encoding="utf-8")
        print(json.dumps(results[-1]), flush=True)
    done = [result for result in results if "error" not in result]
    plot_losses({r["setting"]: own.output / r["setting"] / "metrics.jsonl" for r in done}, own.output / "loss.png")
    (own.output / "results.md").write_text(table(done), encoding="utf-8")
    print(table(done))


def write_shape(folder: Path, shape: str, rows: str) -> None:
    """Write the configuration of LLaMA's shape and a tokenizer trained on ``rows``, of 32,000 entries at most."""
    texts = ["".join(render(row, "alpaca_reference")) for row in read_rows(rows)]
    tokenizer = train_tokenizer(texts, 32000, folder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    LlamaConfig(vocab_size=32000, max_position_embeddings=2048, **SHAPES[shape], **ids).save_pretrained(folder)


def run(own: argparse.Namespace, model: Path, setting: str, zero: str, pack_length: int | None) -> dict:
    """Run one setting and return its figures."""
    overrides = {
        "model.path": model,
        "model.from_scratch": "true",
        "data.train": f"[{own.rows}]",
        "data.packing": str(pack_length is not None).lower(),
        "data.pack_length": pack_length or "null",
        "train.max_steps": own.steps,
        "train.eval_every": own.steps,
        "train.save_every": own.steps,
        "deepspeed.config": zero,
        **dict(item.split("=", 1) for item in own.overrides),
    }
    return run_recipe("llm", "llama_7b_dora_r32", overrides, own.output, setting, own.warmup)


def table(results: list[dict]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| setting | step, s (IQR) | real tokens/s (IQR) | peak GiB | data wait | loss, first to last |"]
    lines.append("|---|---|---|---|---|---|")
    for r in results:
        lines.append(
            f"| {r['setting']} | {r['step_time_s']:.3f} ({r['step_time_s_iqr']:.3f}) | {r['tokens_per_s']:,.0f} "
            f"({r['tokens_per_s_iqr']:,.0f}) | {r['peak_gib']:.1f} | {100 * r['data_wait']:.2f} % | "
            f"{r['first_loss']:.2f} to {r['last_loss']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
