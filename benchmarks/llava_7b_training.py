"""Train the full LLaVA-1.5-7B shape in random bf16 weights for some steps: ZeRO-2 and ZeRO-3, DoRA and LoRA.

    python benchmarks/llava_7b_training.py --output runs/bench [--steps 30] [--settings zero2-dora,zero2-lora]

Runs ``deepspeed pipelines/vlm/train.py`` with the recipes ``llava15_7b_<kind>_r128`` once per setting, on all GPUs, at
a micro-batch of 16 and a step of one micro-batch per GPU, on generated photographs of 640 x 480 pixels with
conversations of the length of LLaVA's mix. Writes ``results.json``, ``results.md`` and ``loss.png``. Speed is the
median over the steps after ``--warmup``. ``--shape tiny`` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from training_runs import environment, run_recipe
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from dora_core.testing.tiny import train_tokenizer
from dora_core.training.metrics import plot_losses
from pipelines.vlm.conversation import IMAGE_MARK, SYSTEM

TEXT = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
VISION = {
    "7b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
}
PICTURE = (640, 480)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--shape", choices=TEXT, default="7b")
    parser.add_argument("--settings", default="zero2-dora,zero2-lora,zero3-dora,zero3-lora")
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--overrides", nargs="*", default=[], help="further overrides of the recipe, as key=value")
    own = parser.parse_args()
    own.output.mkdir(parents=True, exist_ok=True)
    data = own.output / "data"
    if not (data / "rows.json").is_file():
        write_rows(data, num_rows=2000, num_pictures=200)
    model = own.output / "shape"
    if not (model / "config.json").is_file():
        write_shape(model, own.shape, data)
    results = []
    for setting in own.settings.split(","):
        results.append({"setting": setting, **run(own, model, data, setting)})
        text = json.dumps(
            {"environment": environment(), "arguments": vars(own), "runs": results}, indent=2, default=str
        )
        (own.output / "results.json").write_text(text + "\n", encoding="utf-8")
        print(json.dumps(results[-1]), flush=True)
    done = [result for result in results if "error" not in result]
    plot_losses({r["setting"]: own.output / r["setting"] / "metrics.jsonl" for r in done}, own.output / "loss.png")
    (own.output / "results.md").write_text(table(done), encoding="utf-8")
    print(table(done))


def run(own: argparse.Namespace, model: Path, data: Path, setting: str) -> dict:
    """Run one setting, such as ``zero2-dora``, and return its figures."""
    zero, kind = setting.split("-")
    batch_size = own.micro_batch_size * max(1, torch.cuda.device_count())
    overrides = {
        **source(model, data),
        "data.num_workers": own.workers,
        "train.global_batch_size": batch_size,
        "train.micro_batch_size": own.micro_batch_size,
        "train.max_steps": own.steps,
        "train.save_every": own.steps,
        "deepspeed.config": zero,
        **dict(item.split("=", 1) for item in own.overrides),
    }
    figures = run_recipe("vlm", f"llava15_7b_{kind}_r128", overrides, own.output, setting, own.warmup)
    if "num_images" in figures:
        figures["images_per_s"] = figures["num_images"] / figures["step_time_s"]
    return figures


def source(model: Path, data: Path) -> dict[str, str]:
    """Return the overrides that name the shape's configuration and the generated rows."""
    return {
        "model.path": str(model),
        "model.from_scratch": "true",
        "model.language_model": "null",
        "model.vision_tower": "null",
        "model.projector": "null",
        "data.train": f"[{data / 'rows.json'}]",
        "data.images": str(data),
    }


def write_rows(folder: Path, num_rows: int, num_pictures: int) -> None:
    """Write JPEGs as detailed as photographs and conversations as long as those of LLaVA's mix, 6 % of text alone."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_pictures):
        coarse = noise.integers(0, 255, (15, 20, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(PICTURE, Image.Resampling.BICUBIC), dtype=np.int16)
        grain = noise.normal(0, 12, (PICTURE[1], PICTURE[0], 1))
        picture = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.jpg", quality=92)
    words = [f"{a}{b}" for a in ("ba", "de", "ki", "lo", "mu", "ra") for b in ("nd", "st", "ll", "rt", "mp", "ck")]
    rows = []
    for number in range(num_rows):
        has_image = rng.random() > 0.06
        turns = []
        for turn in range(rng.randint(1, 8)):
            question = " ".join(rng.choices(words, k=rng.randint(6, 14))) + "?"
            answer = " ".join(rng.choices(words, k=rng.choice((1, 2, 3, 12, 40))))
            mark = f"{IMAGE_MARK}\n" if has_image and turn == 0 else ""
            turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
        image = {"image": f"{rng.randrange(num_pictures)}.jpg"} if has_image else {}
        rows.append({"id": str(number), **image, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def write_shape(folder: Path, shape: str, data: Path) -> None:
    """Write the configs of LLaVA-1.5's shape and a tokenizer of 32,000 entries at most."""
    rows = json.loads((data / "rows.json").read_text(encoding="utf-8"))
    texts = [turn["value"] for row in rows for turn in row["conversations"]] + [f"{SYSTEM} USER: ASSISTANT:"] * 10
    tokenizer = train_tokenizer(texts, 32000, folder)
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    LlavaConfig(
        text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096, **TEXT[shape], **ids),
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, **VISION[shape]),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        image_seq_length=576,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)


def table(results: list[dict]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| setting | step, s (IQR) | images/s | tokens/s (IQR) | peak GiB | data wait (largest) | loss, first to last |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for r in results:
        lines.append(
            f"| {r['setting']} | {r['step_time_s']:.3f} ({r['step_time_s_iqr']:.3f}) | {r['images_per_s']:.1f} | "
            f"{r['tokens_per_s']:,.0f} ({r['tokens_per_s_iqr']:,.0f}) | {r['peak_gib']:.1f} | "
            f"{100 * r['data_wait']:.2f} % ({100 * r['largest_data_wait']:.2f} %) | "
            f"{r['first_loss']:.2f} to {r['last_loss']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
