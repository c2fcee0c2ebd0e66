"""Splitting over ranks. Run as a script, this file is one of two ranks: see ``run_two_ranks``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dora_core.evaluation.evaluator import EvaluationContext
from dora_core.evaluation.generation import generate_texts, option_log_likelihoods
from dora_core.evaluation.results import Metric, accuracy_metric, average_metric, read_results
from dora_core.evaluation.runner import describe_scores, equal_calls, place_among_ranks, run_evaluator, run_evaluators

BATCH_SIZE = 2
WORDS = ["is", "it", "so", "that", "the", "sea", "and", "sky", "are", "blue", "or", "green", "when", "ice", "floats"]


@dataclass(frozen=True)
class WordTask:
    """A toy benchmark: does the text that follows, or the option that wins, hold the letter e?"""

    name: str
    num_rows: int
    mode: str

    def load(self, section: Any) -> list[dict[str, Any]]:
        return [{"prompt": " ".join(WORDS[: 1 + (7 * place) % 11]), "place": place} for place in range(self.num_rows)]

    def predict(self, rows: list[dict[str, Any]], context: EvaluationContext) -> list[dict[str, Any]]:
        prompts = [row["prompt"] for row in rows]
        if self.mode == "generate":
            texts = generate_texts(
                context.model,
                context.tokenizer,
                prompts,
                batch_size=BATCH_SIZE,
                num_beams=context.section.num_beams,
                max_new_tokens=6,
                num_calls=equal_calls(len(rows), BATCH_SIZE, context),
                synced=context.synced,
            )
        else:
            options = [WORDS[: 2 + row["place"] % 3] for row in rows]
            scores = option_log_likelihoods(
                context.model,
                context.tokenizer,
                prompts,
                options,
                batch_size=BATCH_SIZE,
                num_calls=equal_calls(sum(map(len, options)), BATCH_SIZE, context),
            )
            texts = [choices[own.index(max(own))] for choices, own in zip(options, scores, strict=True)]
        return [{**row, "text": text, "correct": "e" in text} for row, text in zip(rows, texts, strict=True)]

    def score(self, predictions: list[dict[str, Any]]) -> list[Metric]:
        return [accuracy_metric(self.name, [prediction["correct"] for prediction in predictions])]


@dataclass(frozen=True)
class FileTask(WordTask):
    """The toy benchmark with a file of its own."""

    def write_files(self, predictions: list[dict[str, Any]], folder: Path, context: EvaluationContext) -> None:
        places = [prediction["place"] for prediction in predictions]
        written = [metric.name for metric in read_results(folder)]
        (folder / "places.json").write_text(json.dumps([places, written, context.rank]), encoding="utf-8")


@dataclass(frozen=True)
class FullDiskTask(WordTask):
    """The toy benchmark, whose file cannot be written."""

    def write_files(self, predictions: list[dict[str, Any]], folder: Path, context: EvaluationContext) -> None:
        raise OSError("no space left")


@dataclass(frozen=True)
class HalfCopiedTask(WordTask):
    """The toy benchmark, whose data are on the first rank's machine only."""

    rank: int

    def load(self, section: Any) -> list[dict[str, Any]]:
        if self.rank == 1:
            raise ValueError("test.json is missing")
        return super().load(section)


@dataclass(frozen=True)
class UnansweredTask(WordTask):
    """The toy benchmark without answers to compare with."""

    def score(self, predictions: list[dict[str, Any]]) -> list[Metric]:
        return []


TASKS = (
    WordTask("generate seven", 7, "generate"),
    WordTask("rank seven", 7, "rank"),
    WordTask("generate one", 1, "generate"),
    WordTask("rank one", 1, "rank"),
)


def tiny_context(**changes: Any) -> EvaluationContext:
    """Return a context with a byte-level tokenizer and a random model that ends texts at different lengths."""
    alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: place for place, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(alphabet),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model.generation_config.eos_token_id = [0, *range(190, 230)]
    values = {
        "model": model,
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"),
        "section": SimpleNamespace(num_beams=1),
        "config_hash": "settings",
    }
    return EvaluationContext(**{**values, **changes})


def run_all(folder: Path, **place: Any) -> dict[str, Any]:
    """Return the metrics of all tasks, greedy and with beams; rank 0 leaves files in ``folder``."""
    metrics = {}
    for num_beams in (1, 4):
        context = tiny_context(section=SimpleNamespace(num_beams=num_beams), **place)
        results = run_evaluators(
            TASKS,
            context,
            folder / str(num_beams),
            summarize=lambda metrics: [average_metric("mean", metrics)],
        )
        metrics[str(num_beams)] = [asdict(metric) for metric in results]
    return metrics


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def run_as_rank(rank: int, folder: Path) -> None:
    """Evaluate as one of two ranks, moving together and freely, and check that one rank's trouble reaches both."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), world_size=2, rank=rank)
    assert place_among_ranks() == (rank, 2)
    with pytest.raises(ValueError, match="world_size is 3 but 2 ranks"):
        place_among_ranks(0, 3)
    found = {
        name: run_all(folder / name, rank=rank, world_size=2, synced=synced)
        for name, synced in (("synced", True), ("free", False))
    }
    context = tiny_context(rank=rank, world_size=2)
    with pytest.raises(ValueError, match="different rows on different ranks"):
        run_evaluator(TASKS[0], [{"prompt": "a", "place": rank}], context)
    with pytest.raises(ValueError, match="rank 0: OSError: no space left"):
        run_evaluators([FullDiskTask("full disk", 3, "rank")], context, folder / "full disk")
    with pytest.raises(ValueError, match=r"rank 1: test\.json is missing"):
        run_evaluators([HalfCopiedTask("half copied", 3, "rank", rank)], context, folder / "half copied")
    run_evaluators([FileTask("with a file", 3, "rank")], context, folder / "with a file")
    (folder / f"metrics{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def run_two_ranks(folder: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "generate seven: accuracy" in outputs[0]
    assert "accuracy" not in outputs[1]


def test_two_ranks_give_exactly_what_one_process_gives(tmp_path: Path) -> None:
    run_two_ranks(tmp_path)
    expected = run_all(tmp_path / "alone")
    texts = {row["text"] for row in read_predictions(tmp_path / "alone" / "4") if row["place"] > 0}
    assert len(texts) > 3
    for rank in range(2):
        found = json.loads((tmp_path / f"metrics{rank}.json").read_text(encoding="utf-8"))
        assert found == {"synced": expected, "free": expected}
    for kind in ("synced", "free"):
        for num_beams in ("1", "4"):
            folder, alone = tmp_path / kind / num_beams, tmp_path / "alone" / num_beams
            assert read_predictions(folder) == read_predictions(alone)
            assert read_results(folder) == read_results(alone)
            assert len(read_predictions(folder)) == sum(task.num_rows for task in TASKS)

    written = json.loads((tmp_path / "with a file" / "places.json").read_text(encoding="utf-8"))
    assert written == [[0, 1, 2], ["with a file"], 0]
    assert len(read_predictions(tmp_path / "full disk")) == 3
    assert not (tmp_path / "half copied").exists()


def test_an_evaluators_own_files_are_written_once_its_results_are_there(tmp_path: Path) -> None:
    run_evaluators([FileTask("one", 2, "rank"), TASKS[3]], tiny_context(), tmp_path)
    assert json.loads((tmp_path / "places.json").read_text(encoding="utf-8")) == [[0, 1], ["one"], 0]


def test_what_fails_on_an_only_rank_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space left"):
        run_evaluators([FullDiskTask("full disk", 1, "rank")], tiny_context(), tmp_path)


def test_progress_says_when_there_are_no_answers_to_score_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_evaluators([UnansweredTask("kept secret", 1, "rank")], tiny_context(), tmp_path) == []
    assert capsys.readouterr().out == "[1/1] kept secret: no scores, the answers are not known here\n"
    assert read_results(tmp_path) == []
    assert len(read_predictions(tmp_path)) == 1


def test_progress_shows_the_reported_score_and_not_its_parts() -> None:
    whole = accuracy_metric("task", [True, False])
    part = accuracy_metric("task-part", [True])
    assert describe_scores([whole, part]) == "accuracy 0.5000"


def test_metrics_carry_the_hashes_and_predictions_the_place_of_their_row() -> None:
    context = tiny_context()
    rows = TASKS[0].load(None)
    [metric], predictions = run_evaluator(TASKS[0], rows, context, commit="abc")
    assert [prediction["index"] for prediction in predictions] == list(range(7))
    assert [prediction["prompt"] for prediction in predictions] == [row["prompt"] for row in rows]
    assert (metric.n, metric.config_hash, metric.commit, len(metric.dataset_hash)) == (7, "settings", "abc", 64)
    [other], _ = run_evaluator(TASKS[0], rows[:-1], context)
    assert other.dataset_hash != metric.dataset_hash


def test_a_finished_evaluator_is_on_disk_before_the_next_one_runs(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Failing(WordTask):
        def predict(self, rows: list[dict[str, Any]], context: EvaluationContext) -> list[dict[str, Any]]:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run_evaluators([TASKS[3], Failing("failing", 2, "rank")], tiny_context(), tmp_path)
    assert [metric.name for metric in read_results(tmp_path)] == ["rank one"]
    assert len(read_predictions(tmp_path)) == 1


def test_one_process_is_rank_zero_of_one_and_impossible_places_are_refused() -> None:
    assert place_among_ranks() == (0, 1)
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        place_among_ranks(2, 2)
    with pytest.raises(ValueError, match="but 1 ranks are connected"):
        place_among_ranks(0, 2)


if __name__ == "__main__":
    run_as_rank(int(sys.argv[1]), Path(sys.argv[2]))
