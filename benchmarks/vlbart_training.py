"""Train the bart-base shape in random weights on the paper's mixes of tasks: cached and online features, DoRA and LoRA.

    python benchmarks/vlbart_training.py --output runs/bench [--steps 40] [--settings video-cached-dora-fp32]

Runs ``deepspeed pipelines/video/train.py`` with the recipes ``vlbart_<video|image>_dora_r128`` once per setting, on one
GPU; for LoRA with nothing changed but the adapter's kind, because LoRA's own recipes have larger batches and, for
images, freeze the layer norms. A step takes 40 rows of one of the four video tasks (64 frames of 512 numbers, 400 to
600 text tokens), or 300, 500, 100 or 250 rows of one of the four image tasks (36 vectors of 2048 numbers). Cached
features are fp16 in WebDataset shards. Online, data workers read H.264 clips of 96 s at 30 fps, 64 frames each, or
JPEGs of 640 x 480; the step encodes them with a random ViT-B/32 or RN101 at 224 px. Writes ``results.json`` and
``results.md``. Speed is over the steps after ``--warmup``. ``--shape tiny`` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from training_runs import environment, run_recipe
from transformers import BartConfig

from dora_core.data.shards import write_shards
from dora_core.testing.tiny_bart import save_tiny_bart
from dora_core.training.metrics import read_metrics

SHAPES = {
    "base": {"d_model": 768, "layers": 6, "heads": 12, "ffn": 3072},
    "tiny": {"d_model": 64, "layers": 2, "heads": 4, "ffn": 128},
}
SETTINGS = ",".join(
    f"{group}-{setting}"
    for group in ("video", "image")
    for setting in ("cached-dora-fp32", "cached-dora-bf16", "cached-lora-bf16", "online-dora-bf16")
)
COLLECTIONS = {"video": ("tv", "how2", "yc2"), "image": ("COCO", "VG", "nlvr")}
WORDS = [a + b for a in ("ba", "de", "ki", "lo", "mu", "ra", "so", "te") for b in ("nd", "st", "ll", "rt", "mp", "ck")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--settings", default=SETTINGS)
    parser.add_argument("--rows", type=int, default=2000, help="annotations per task")
    parser.add_argument("--media", type=int, default=12, help="different videos, and 20 times as many pictures")
    parser.add_argument("--video-size", default="640x360", help="of the videos that are read online")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--overrides", nargs="*", default=[], help="further overrides of the recipe, as key=value")
    own = parser.parse_args()
    data = own.output / "data"
    if not (data / "model" / "config.json").is_file():
        write_annotations(data, own.rows)
        write_features(data, own.rows)
        write_model(data / "model", own.shape)
    if "online" in own.settings and not (data / "media").is_dir():
        write_media(data, own.media, own.rows, own.video_size, seconds=96 if own.shape == "base" else 3)
    results = []
    for setting in own.settings.split(","):
        results.append({"setting": setting, **run(own, data, setting)})
        content = {"environment": environment(), "arguments": vars(own), "runs": results}
        (own.output / "results.json").write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        print(json.dumps(results[-1]), flush=True)
    lines = table([result for result in results if "error" not in result])
    (own.output / "results.md").write_text(lines, encoding="utf-8")
    print(lines)


def run(own: argparse.Namespace, data: Path, setting: str) -> dict[str, Any]:
    """Run one setting, such as ``video-cached-dora-fp32``, and return its figures."""
    group, mode, kind, precision = setting.split("-")
    encoder = ("open_clip:ViT-B-32", "frame") if group == "video" else ("open_clip:RN101", "grid")
    if own.shape == "tiny":
        encoder = ("pixels:12", encoder[1])
    overrides = {
        "model.path": data / "model",
        "model.from_scratch": "true",
        "data.path": data,
        "data.visual.path": data / ("features" if mode == "cached" else "media"),
        "data.visual.mode": mode,
        "data.visual.encoder": encoder[0],
        "data.visual.kind": encoder[1],
        "data.visual.precision": precision,
        "data.num_workers": own.workers,
        "train.precision": precision,
        "adapter.kind": kind,
        "train.max_steps": own.steps,
        "train.save_every": own.steps,
        "evaluate.after_training": "false",
        **dict(item.split("=", 1) for item in own.overrides),
    }
    figures = run_recipe("video", f"vlbart_{group}_dora_r128", overrides, own.output, setting, own.warmup, num_gpus=1)
    if "error" in figures:
        return figures
    rows = [row for row in read_metrics(own.output / setting / "metrics.jsonl") if "loss" in row]
    steady = [row for row in rows if row["step"] > own.warmup]
    before = next(row for row in reversed(rows) if row["step"] <= own.warmup)
    seconds = sum(row["step_time_s"] for row in steady)
    counted = {name: rows[-1][name] - before[name] for name in ("num_rows", "num_frames")}
    by_task = {
        name: statistics.median(row["step_time_s"] for row in steady if row["task"] == name)
        for name in sorted({row["task"] for row in steady})
    }
    return figures | {
        "rows_per_s": counted["num_rows"] / seconds,
        "frames_per_s": counted["num_frames"] / seconds,
        "mean_data_wait": sum(row["data_wait"] * row["step_time_s"] for row in steady) / seconds,
        "step_time_s_by_task": by_task,
    }


def write_annotations(root: Path, num: int) -> None:
    """Write training annotations of all eight tasks."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    def lines(path: str, rows: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for name in COLLECTIONS["video"]:
        speech = ({"vid_name": f"{n}", "sub": [{"text": text(150, 220), "start": 0, "end": 9}]} for n in range(num))
        lines(f"video/ann/{name}_subtitles.jsonl", speech)
    for path, choices in (("tvqa/tvqa_train", 5), ("how2qa/how2qa_train_release", 4)):
        rows = [
            {"qid": n, "q": text(8, 14), "answer_idx": rng.randrange(choices), "ts": "20.16-25.12", "vid_name": f"{n}"}
            | {f"a{place}": text(3, 7) for place in range(choices)}
            for n in range(num)
        ]
        lines(f"video/ann/{path}.jsonl", rows)
    for path in ("tvc/tvc_train_release", "yc2c/yc2c_train_release"):
        rows = [
            {"vid_name": f"{n}", "clip_id": n, "ts": [3.1, 9.4], "descs": [{"desc": text(8, 14)}]} for n in range(num)
        ]
        lines(f"video/ann/{path}.jsonl", rows)
    question = [
        {"question_id": n, "img_id": f"{n}", "sent": text(5, 9), "label": {text(1, 2): 1.0}} for n in range(num)
    ]
    lines("vqa/karpathy_train.json", question)
    lines("GQA/train.json", question)
    lines("GQA/valid.json", question[: num // 8])
    pairs = [
        {"uid": n, "identifier": f"{n}", "img0": f"{n}", "img1": f"{num - 1 - n}", "sent": text(8, 16), "label": n % 2}
        for n in range(num)
    ]
    lines("nlvr/train.json", pairs)
    images = [
        {"cocoid": n, "filename": f"{n}.jpg", "split": "train", "sentences": [{"raw": text(8, 12)}]} for n in range(num)
    ]
    (root / "COCO").mkdir(exist_ok=True)
    (root / "COCO" / "dataset_coco.json").write_text(json.dumps({"images": images}), encoding="utf-8")


def write_features(root: Path, num: int) -> None:
    """Write shards of noise in the form of the features: 64 frames of a video, 36 vectors of a picture."""
    noise = np.random.default_rng(0)
    for group, shape in (("video", (64, 512)), ("image", (36, 2048))):
        pool = [noise.standard_normal(shape, np.float32).astype(np.float16) for _ in range(32)]
        for name in COLLECTIONS[group]:
            folder = root / "features" / name
            samples = ({"__key__": f"{n}", "npy": _npy(pool[n % 32])} for n in range(num))
            files = write_shards(samples, folder, max_count=1000)
            counts = [min(1000, num - 1000 * place) for place in range(len(files))]
            manifest = {
                "format": 1,
                "dim": shape[1],
                "num_samples": num,
                "shards": [
                    {"name": file.name, "num_samples": count} for file, count in zip(files, counts, strict=True)
                ],
            }
            (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def write_media(root: Path, num_media: int, num: int, video_size: str, seconds: int) -> None:
    """Write a few videos and pictures under the names of all annotations, as links to the same files."""
    size = tuple(map(int, video_size.split("x")))
    videos, pictures = root / "media" / "videos", root / "media" / "pictures"
    noise = np.random.default_rng(0)
    for folder in (videos, pictures):
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_media):
        with av.open(str(videos / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast", "crf": "26"})
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            still = np.asarray(Image.fromarray(noise.integers(0, 255, (9, 16, 3), dtype=np.uint8)).resize(size, 3))
            for frame in range(30 * seconds):
                picture = av.VideoFrame.from_ndarray(np.roll(still, 2 * frame, 1), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    for number in range(20 * num_media):
        coarse = Image.fromarray(noise.integers(0, 255, (15, 20, 3), dtype=np.uint8)).resize((640, 480), 3)
        grain = np.asarray(coarse, np.int16) + noise.normal(0, 12, (480, 640, 1))
        Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).save(pictures / f"{number}.jpg", quality=92)
    for group, source, suffix, count in (
        ("video", videos, "mp4", num_media),
        ("image", pictures, "jpg", 20 * num_media),
    ):
        for name in COLLECTIONS[group]:
            folder = root / "media" / name
            folder.mkdir(parents=True, exist_ok=True)
            for n in range(num):
                (folder / f"{n}.{suffix}").symlink_to((source / f"{n % count}.{suffix}").resolve())


def write_model(folder: Path, shape: str) -> None:
    """Write the config of the shape, with BART's vocabulary, and a small tokenizer."""
    model = save_tiny_bart(folder, [" ".join(WORDS)] * 20, vocab_size=1000)
    facts = SHAPES[shape]
    layers = {f"{part}_{name}": facts[key] for part in ("encoder", "decoder") for name, key in PARTS.items()}
    plain = {**model.config.to_dict(), "vocab_size": 50465, "d_model": facts["d_model"], "dropout": 0.1}
    BartConfig(**{**plain, **layers, "max_position_embeddings": 1024}).save_pretrained(folder)
    (folder / "model.safetensors").unlink()


PARTS = {"layers": "layers", "attention_heads": "heads", "ffn_dim": "ffn"}


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def table(results: list[dict[str, Any]]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| setting | step, s (IQR) | rows/s | frames/s | peak GiB | data wait (largest step) |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['setting']} | {r['step_time_s']:.3f} ({r['step_time_s_iqr']:.3f}) | {r['rows_per_s']:,.0f} | "
            f"{r['frames_per_s']:,.0f} | {r['peak_gib']:.1f} | {100 * r['mean_data_wait']:.2f} % "
            f"({100 * r['largest_data_wait']:.1f} %) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
