"""Scoring a model for real: the same answers for every batch size, on one rank, on two, and under ZeRO-3."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dora_core.adapters import apply_adapters, save_adapter
from dora_core.cli import main as dora
from dora_core.evaluation.results import read_results
from dora_core.media.images import ImageError
from dora_core.testing.contracts import train_tiny
from dora_core.testing.ranks import RankError, run_on_ranks
from pipelines.vlm.config import DataSection, EvaluateSection, ModelSection, VLMAdapterSection
from pipelines.vlm.encode import Encoder
from pipelines.vlm.evaluate import evaluate_model
from pipelines.vlm.model import load_llava, load_tokenizer

COLOURS = [(230, 20, 20), (20, 200, 20), (20, 20, 230), (240, 240, 40), (10, 10, 10)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Seven questions about five pictures for gqa, two for mmbench, and for scienceqa three, one with a picture."""
    root = tmp_path_factory.mktemp("eval")
    (root / "gqa" / "images").mkdir(parents=True)
    for place, colour in enumerate(COLOURS):
        Image.new("RGB", (20 + place, 16), colour).save(root / "gqa" / "images" / f"{place}.jpg")
    questions = ["what colour is it", "how many", "is it a bus", "red?", "what is this thing here", "one", "yes or no"]
    gqa = {
        str(place): {"question": text, "answer": "red", "imageId": str(place % 5)}
        for place, text in enumerate(questions)
    }
    (root / "gqa" / "testdev_balanced_questions.json").write_text(json.dumps(gqa))
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), COLOURS[0]).save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    (root / "mmbench").mkdir()
    header = ["index", "question", "hint", "A", "B", "answer", "image", "category", "l2-category"]
    lines = [[str(n), f"what {n}", "", "red", "blue", "A", encoded, "c", "d"] for n in (1, 2)]
    text = "\n".join("\t".join(cells) for cells in [header, *lines])
    (root / "mmbench" / "mmbench_dev_20230712.tsv").write_text(text + "\n")
    (root / "scienceqa").mkdir()
    problems = {
        str(number): {
            "question": f"which {number}",
            "choices": ["red", "blue"],
            "answer": number % 2,
            "hint": "",
            "image": "image.png" if number == 0 else None,
        }
        for number in range(3)
    }
    (root / "scienceqa" / "images" / "test" / "0").mkdir(parents=True)
    Image.new("RGB", (12, 9), COLOURS[3]).save(root / "scienceqa" / "images" / "test" / "0" / "image.png")
    (root / "scienceqa" / "problems.json").write_text(json.dumps(problems))
    (root / "scienceqa" / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    return root


TASKS = ["gqa", "mmbench", "scienceqa"]


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def evaluated(llava_folder, section: EvaluateSection, folder: Path) -> list[str]:
    given = ModelSection(path=str(llava_folder))
    tokenizer = load_tokenizer(given)
    model, vision = load_llava(given, tokenizer, "fp32")
    encoder = Encoder(tokenizer, vision, DataSection(train=["none"]))
    evaluate_model(model, encoder, section, torch.float32, folder, model_id="random")
    assert model.training and not model.model.vision_tower.training
    return [row["text"] for row in predictions(folder)]


@pytest.fixture(scope="module")
def expected(llava_folder, data, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("alone")
    section = EvaluateSection(tasks=TASKS, path=str(data), batch_size=1, max_new_tokens=8)
    return evaluated(llava_folder, section, folder)


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_answers_do_not_depend_on_the_batch_size(llava_folder, data, tmp_path, expected, batch_size):
    section = EvaluateSection(tasks=TASKS, path=str(data), batch_size=batch_size, max_new_tokens=8)
    assert evaluated(llava_folder, section, tmp_path) == expected
    assert len(expected) == 7 + 4 + 3 and len(set(expected)) > 5


def test_the_picture_is_looked_at_and_shuffling_changes_whose_it_is(llava_folder, data, tmp_path, expected):
    section = EvaluateSection(tasks=["gqa"], path=str(data), max_new_tokens=8, shuffle_images=True)
    texts = evaluated(llava_folder, section, tmp_path)
    assert texts != expected[:7]
    images = [row["image"] for row in predictions(tmp_path)]
    assert images == [f"gqa/images/{place}.jpg" for place in (3, 4, 0, 1, 0, 1, 2)]
    plain = EvaluateSection(tasks=["gqa"], path=str(data), max_new_tokens=8)
    evaluated(llava_folder, plain, tmp_path / "plain")
    hashes = [{m.dataset_hash for m in read_results(folder)} for folder in (tmp_path, tmp_path / "plain")]
    assert hashes[0] != hashes[1]


def test_llavas_answer_files_and_submissions_are_left_beside_the_scores(llava_folder, data, tmp_path):
    section = EvaluateSection(tasks=TASKS, path=str(data), max_new_tokens=4)
    evaluated(llava_folder, section, tmp_path)
    for task in TASKS:
        rows = [json.loads(line) for line in (tmp_path / "answers" / f"{task}.jsonl").read_text().splitlines()]
        assert {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} <= set(rows[0])
        assert rows[0]["model_id"] == "random"
    assert (tmp_path / "submissions").is_dir()
    metrics = {metric.name: metric for metric in read_results(tmp_path)}
    assert metrics["vlm/average"].metric == "score"
    assert metrics["vlm/average"].extra["parts"] == [f"vlm/{task}" for task in TASKS]


def broken(data: Path, tmp_path: Path) -> Path:
    (tmp_path / "gqa" / "images").mkdir(parents=True)
    for file in (data / "gqa").rglob("*.*"):
        (tmp_path / file.relative_to(data)).write_bytes(file.read_bytes())
    (tmp_path / "gqa" / "images" / "3.jpg").write_bytes(b"\xff\xd8\xff broken")
    return tmp_path


def test_a_picture_that_cannot_be_read_ends_the_scoring(llava_folder, data, tmp_path):
    section = EvaluateSection(tasks=["gqa"], path=str(broken(data, tmp_path)))
    with pytest.raises(ImageError, match=r"3\.jpg"):
        evaluated(llava_folder, section, tmp_path / "out")


def test_a_picture_that_one_rank_cannot_read_ends_the_scoring_on_both(llava_folder, data, tmp_path):
    with pytest.raises(RankError, match=r"rank 1: .*3\.jpg") as caught:
        run_on_ranks(train_tiny, 2, "vlm", tmp_path, "scored", scored(llava_folder, broken(data, tmp_path), tmp_path))
    assert str(caught.value).count("RankFailureError") >= 2


def test_nothing_to_score_is_an_error(llava_folder, data, tmp_path):
    with pytest.raises(ValueError, match=r"evaluate\.tasks is \[\]"):
        evaluated(llava_folder, EvaluateSection(tasks=[], path=str(data)), tmp_path)
    with pytest.raises(ValueError, match=r"Unknown evaluator .vlm/gqq.\. Did you mean vlm/gqa"):
        evaluated(llava_folder, EvaluateSection(tasks=["gqq"], path=str(data)), tmp_path)


def scored(llava_folder: Path, data: Path, folder: Path, tasks: tuple[str, ...] = ("gqa",)) -> dict:
    """Return the settings of a run that scores before its only step, on rows of text."""
    row = {"id": "1", "conversations": [{"from": "human", "value": "yes"}, {"from": "gpt", "value": "no"}]}
    (folder / "rows.json").write_text(json.dumps([row] * 4))
    return {
        "model.path": llava_folder,
        "data.train": "[rows.json]",
        "data.num_validation": 0,
        "train.global_batch_size": 2,
        "train.micro_batch_size": 1,
        "train.max_steps": 1,
        "train.eval_every": "null",
        "evaluate.before_training": "true",
        "evaluate.path": data,
        "evaluate.tasks": f"[{', '.join(tasks)}]",
        "evaluate.batch_size": 2,
        "evaluate.max_new_tokens": 8,
    }


@pytest.mark.parametrize(("world_size", "zero"), [(1, "zero0"), (2, "zero2"), (2, "zero3")])
def test_scores_before_training_are_those_of_the_model_on_any_ranks(
    llava_folder, data, tmp_path, expected, world_size, zero
):
    settings = {**scored(llava_folder, data, tmp_path, TASKS), "deepspeed.config": zero}
    run_on_ranks(train_tiny, world_size, "vlm", tmp_path, "scored", settings, timeout_s=120)
    folder = tmp_path / "runs" / "scored" / "results" / "before"
    assert [row["text"] for row in predictions(folder)] == expected
    assert (folder / "accuracy.png").stat().st_size > 0


def test_the_command_scores_a_model_with_its_adapter(llava_folder, data, tmp_path, monkeypatch, expected):
    given = ModelSection(path=str(llava_folder))
    model, _ = load_llava(given, load_tokenizer(given), "fp32")
    config = VLMAdapterSection(rank=2, alpha=4)
    apply_adapters(model, config)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias.add_(1)
    save_adapter(model, config, tmp_path / "adapter", str(llava_folder))
    monkeypatch.chdir(tmp_path)
    words = ["--config", "tiny", "--model.path", str(llava_folder), "--evaluate.path", str(data)]
    words += ["--evaluate.tasks", "[gqa]", "--evaluate.max_new_tokens", "8"]
    dora(["evaluate", "vlm", *words, "--output", "base"])
    dora(["evaluate", "vlm", *words, "--output", "adapted", "--adapter", "adapter"])
    assert [row["text"] for row in predictions(tmp_path / "base")] == expected[:7]
    assert [row["text"] for row in predictions(tmp_path / "adapted")] != expected[:7]
    dora(["evaluate", "vlm", *words, "--output", "half", "--adapter", "adapter", "--train.precision", "bf16"])
    assert len(predictions(tmp_path / "half")) == 7


def test_a_run_in_half_precision_is_scored_with_its_projector_trained(llava_folder, data, tmp_path):
    settings = {**scored(llava_folder, data, tmp_path), "train.precision": "bf16"}
    run_on_ranks(train_tiny, 1, "vlm", tmp_path, "half", settings, timeout_s=120)
    assert len(predictions(tmp_path / "runs" / "half" / "results" / "before")) == 7
