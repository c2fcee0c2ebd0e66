"""Measure how fast pictures and conversations become batches: images/s by number of worker processes.

    python benchmarks/image_loading.py --output runs/bench [--workers 0,1,2,4] [--source folder,shards]

On the rows and JPEGs that ``llava_7b_training.py`` generates (640 x 480 pixels; read, decoded, padded, resized to 336
and tokenized), from a folder and from WebDataset shards. Each figure is the median of ``--repeats`` passes over
``--batches`` batches of 16 rows, timed after two batches of warm-up, with the spread of the passes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from llava_7b_training import write_rows, write_shape
from training_runs import environment, iqr
from transformers import AutoTokenizer

from dora_core.data.loader import StepLoader
from dora_core.data.sampler import StepPlan
from dora_core.data.shards import write_shards
from pipelines.vlm.batches import Collate
from pipelines.vlm.config import DataSection
from pipelines.vlm.data import ConversationRows, load_training_data
from pipelines.vlm.encode import Encoder
from pipelines.vlm.towers import VisionFacts

BATCH = 16
VISION = VisionFacts(size=336, num_tokens=576)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", default="0,1,2,4")
    parser.add_argument("--source", default="folder,shards")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    own = parser.parse_args()
    data, model = own.output / "data", own.output / "shape"
    if not (data / "rows.json").is_file():
        write_rows(data, num_rows=2000, num_pictures=200)
    if not (model / "config.json").is_file():
        write_shape(model, "tiny", data)
    tokenizer = AutoTokenizer.from_pretrained(model)
    results = []
    for source in own.source.split(","):
        section = DataSection(
            train=[str(data / "rows.json" if source == "folder" else shards_of(data))], images=str(data)
        )
        rows = load_training_data(section, Encoder(tokenizer, VISION, section), seed=0)[0]
        for workers in map(int, own.workers.split(",")):
            rates = [
                images_per_s(rows, tokenizer.pad_token_id, workers, own.batches, seed) for seed in range(own.repeats)
            ]
            results.append(
                {"source": source, "workers": workers, "images_per_s": statistics.median(rates), "iqr": iqr(rates)}
            )
            print(json.dumps(results[-1]), flush=True)
    report = {"environment": environment(), "num_cpus": os.cpu_count(), "arguments": vars(own), "results": results}
    (own.output / "image_loading.json").write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")


def images_per_s(rows: ConversationRows, pad_id: int, num_workers: int, num_batches: int, seed: int) -> float:
    """Return the rate over ``num_batches`` batches after two of warm-up."""
    plan = StepPlan(num_rows=len(rows), global_batch_size=BATCH, micro_batch_size=BATCH, seed=seed)
    batches = iter(
        StepLoader(plan, rows, Collate(pad_id, VISION.size), end_step=num_batches + 2, num_workers=num_workers)
    )
    for _ in range(2):
        next(batches)
    started, num_images = time.perf_counter(), 0
    for (batch,) in batches:
        num_images += batch["counts"]["num_images"]
    return num_images / (time.perf_counter() - started)


def shards_of(data: Path) -> Path:
    """Write the rows as shards of 250 samples once and return their folder."""
    folder = data / "shards"
    if not folder.is_dir():
        rows = json.loads((data / "rows.json").read_text(encoding="utf-8"))
        samples = (
            {"__key__": f"{place:06d}", "json": json.dumps(row).encode()}
            | ({"jpg": (data / row["image"]).read_bytes()} if "image" in row else {})
            for place, row in enumerate(rows)
        )
        write_shards(samples, folder, max_count=250)
    return folder


if __name__ == "__main__":
    main()
