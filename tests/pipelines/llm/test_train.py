"""Training as a whole run: evaluation inside it, packing, full fine-tuning, extras, and the command line's verbs."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_core.adapters.agreement import RankFailureError
from dora_core.cli import main as dora
from dora_core.evaluation.results import read_results
from dora_core.testing.contracts import train_tiny
from dora_core.testing.ranks import run_on_ranks
from pipelines.llm.prepare import prepare

SHORT = {"train.max_steps": 3, "train.eval_every": 3, "train.save_every": 3}
SCORED = {"evaluate.after_training": "true", "evaluate.limit": 5, "evaluate.tasks": "[boolq, piqa]"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    prepare(folder / "data" / "world", hidden=32, layers=2)
    return folder


def train(folder, world_size, run, **overrides):
    return run_on_ranks(train_tiny, world_size, "llm", folder, run, {**SHORT, **overrides}, timeout_s=240)[0]


def predictions(folder, run):
    lines = (folder / "runs" / run / "results" / "after" / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("mode", ["generate", "rank"])
def test_scores_after_training_are_the_same_under_zero_3_and_on_one_rank(folder, mode):
    scored = {**SCORED, "evaluate.mode": mode}
    for world_size, zero in ((1, "zero0"), (2, "zero0"), (2, "zero3")):
        train(folder, world_size, f"{mode}-{world_size}-{zero}", **scored, **{"deepspeed.config": zero})
    expected = predictions(folder, f"{mode}-1-zero0")
    assert len(expected) == 10
    for run in (f"{mode}-2-zero0", f"{mode}-2-zero3"):
        assert [row["pred"] for row in predictions(folder, run)] == [row["pred"] for row in expected]
        after = folder / "runs" / run / "results" / "after"
        metrics = {metric.name: metric for metric in read_results(after)}
        assert metrics["llm/boolq"].n == 5
        assert metrics["llm/average"].stderr >= 0
        assert (after / "accuracy.png").stat().st_size > 0


def train_on_rows_of_the_rank(world, folder, paths):
    """Train with the rows at ``paths[rank]``; return how it failed."""
    overrides = {**SHORT, "data.train": f"[{paths[world.rank]}]"}
    with pytest.raises(RankFailureError) as failure:
        train_tiny(world, "llm", folder, "unequal", overrides)
    return str(failure.value)


@pytest.mark.parametrize(
    "rows, said", [("other.json", "Rank 1 has other training data than rank 0"), ("missing.json", "missing.json")]
)
def test_a_rank_without_the_others_rows_ends_the_run_on_all(folder, rows, said):
    (folder / "other.json").write_text(json.dumps([{"instruction": "say hello", "output": "hello"}] * 400))
    train_file = folder / "data" / "world" / "commonsense_mix.json"
    failures = run_on_ranks(train_on_rows_of_the_rank, 2, folder, [train_file, folder / rows])
    assert all(said in failure for failure in failures), failures


def test_packing_trains_on_every_row_in_fewer_steps(folder):
    padded = train(folder, 1, "padded", **{"train.max_steps": "null", "train.num_epochs": 0.05, "train.lr": 1e-9})
    packed = train(
        folder,
        1,
        "packed",
        **{"train.max_steps": "null", "train.num_epochs": 0.05, "train.lr": 1e-9, "data.packing": "true"},
    )
    assert len(packed) < len(padded)
    assert sum(packed) / len(packed) == pytest.approx(sum(padded) / len(padded), rel=0.02)


def test_full_fine_tuning_leaves_a_model_that_transformers_loads(folder):
    full = {"adapter.kind": "full", "adapter.targets": ".*", "deepspeed.config": "zero3", "log.profile_step": 2}
    train(folder, 2, "full", **full)
    profile = json.loads((folder / "runs" / "full" / "profile.json").read_text())
    assert profile["steps"] == [2, 3] and profile["cpu_ms"]  # there is no fourth
    model = AutoModelForCausalLM.from_pretrained(folder / "runs" / "full" / "model")
    base = AutoModelForCausalLM.from_pretrained(folder / "data" / "world" / "model")
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)]
    assert all(changed)
    assert AutoTokenizer.from_pretrained(folder / "runs" / "full" / "model").eos_token_id is not None


def test_an_adapter_with_extras_is_merged_by_the_command_into_a_model_with_its_logits(folder, monkeypatch, capsys):
    train(folder, 1, "extras", **{"adapter.trainable": "[embed_tokens, lm_head, norm]", "train.lr": 0.05})
    monkeypatch.chdir(folder)
    adapter = "runs/extras/adapter"
    dora(["merge", "llm", "--adapter", adapter, "--output", "merged", "--precision", "fp32"])
    printed = capsys.readouterr().out
    assert "merged 10 layers, maximum logit difference" in printed
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    base = AutoModelForCausalLM.from_pretrained(folder / "data" / "world" / "model")
    probe = torch.arange(40).reshape(2, 20)
    from dora_core.adapters import load_adapter

    unmerged = AutoModelForCausalLM.from_pretrained(folder / "data" / "world" / "model")
    load_adapter(unmerged, folder / adapter)
    with torch.no_grad():
        assert torch.allclose(merged(probe).logits, unmerged(probe).logits, atol=1e-5)
        assert not torch.allclose(merged(probe).logits, base(probe).logits, atol=1e-2)
