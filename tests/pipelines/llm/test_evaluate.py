from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dora_core.evaluation.results import read_results
from dora_core.registry import RegistryError
from pipelines.llm.config import EvaluateSection
from pipelines.llm.data import render_prompt, task_instruction
from pipelines.llm.evaluate import evaluate_model
from pipelines.llm.evaluators import ANSWER_PREFIX


def row(instruction: str, answer: str) -> dict[str, Any]:
    return {"instruction": instruction, "input": "", "output": ANSWER_PREFIX + answer, "answer": answer}


def piqa_row(goal: str, answer: str) -> dict[str, Any]:
    return row(task_instruction("piqa", goal=goal, options=["twist the lid", "boil the lid"]), answer)


def arc_row(question: str, num_options: int, answer: str) -> dict[str, Any]:
    options = [f"thing {number}" for number in range(1, num_options + 1)]
    return row(task_instruction("arc_easy", question=question, options=options), answer)


def boolq_row(question: str, answer: str) -> dict[str, Any]:
    return row(task_instruction("boolq", question=question), answer)


ROWS = {
    "boolq": [boolq_row("does ice float", "true"), boolq_row("is the sea made of dry sand", "false")],
    "piqa": [
        piqa_row("open a jar", "solution1"),
        piqa_row("open a jar that nobody has opened for a very long time", "solution2"),
        piqa_row("close it", "solution1"),
    ],
    "ARC-Easy": [
        arc_row("which", 3, "answer3"),
        arc_row("which one of them", 4, "answer1"),
        arc_row("w", 5, "answer5"),
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("commonsense")
    for folder, rows in ROWS.items():
        (root / folder).mkdir()
        (root / folder / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for solution1; texts start with <s>."""
    vocabulary = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: place for place, token in enumerate(vocabulary)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["solution1"])
    return tokenizer


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def constant_model(tokenizer: PreTrainedTokenizerFast, token: str | None) -> LlamaForCausalLM:
    """Return a model that says ``token`` whatever it has read; without one, all tokens are equally likely."""
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        if token is not None:
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] = 1
    return model


def predictions_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("mode", "num_beams"), [("generate", 1), ("generate", 4), ("rank", 1)])
def test_predictions_do_not_depend_on_the_batch_size(
    data: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, mode: str, num_beams: int
) -> None:
    model = tiny_model(tokenizer)
    found = []
    for batch_size in (1, 4):
        section = EvaluateSection(
            tasks=["piqa", "arc_easy"],
            path=str(data),
            mode=mode,
            batch_size=batch_size,
            num_beams=num_beams,
            max_new_tokens=8,
        )
        metrics = evaluate_model(model, tokenizer, section, "alpaca", tmp_path / str(batch_size))
        rows = predictions_of(tmp_path / str(batch_size))
        found.append((metrics, [{**row, "log_likelihoods": None} for row in rows]))
    assert found[0] == found[1]
    assert len({row["output_pred"] for row in found[0][1]}) > 1


def test_generate_mode_scores_a_model_that_always_says_solution1(
    data: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = EvaluateSection(tasks=["boolq", "piqa"], path=str(data), num_beams=1, max_new_tokens=3)
    model = constant_model(tokenizer, "solution1").train()
    boolq, piqa, mean = metrics = evaluate_model(model, tokenizer, section, "alpaca", tmp_path)
    assert model.training
    assert (boolq.name, boolq.value, boolq.n, boolq.extra["num_unparsed"]) == ("llm/boolq", 0.0, 2, 2)
    assert (piqa.name, piqa.value, piqa.n, piqa.extra["num_unparsed"]) == ("llm/piqa", 2 / 3, 3, 0)
    assert piqa.stderr == pytest.approx(math.sqrt(2 / 9 / 3))
    assert (piqa.extra["chance"], piqa.extra["majority"]) == (0.5, 2 / 3)
    assert (piqa.extra["majority_answer"], piqa.extra["mode"]) == ("solution1", "generate")
    assert (mean.name, mean.value, mean.n) == ("llm/average", 1 / 3, 5)
    assert mean.stderr == pytest.approx(piqa.stderr / 2)
    assert len(piqa.dataset_hash) == len(piqa.config_hash) == 64
    assert read_results(tmp_path) == metrics
    assert predictions_of(tmp_path)[3] == {
        **ROWS["piqa"][1],
        "output_pred": "solution1solution1solution1",
        "pred": "solution1",
        "correct": False,
        "mode": "generate",
        "task": "llm/piqa",
        "index": 1,
    }
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["llm/average", "accuracy", "0.3333"]


def test_rank_mode_takes_the_first_of_equal_options_and_only_those_of_the_row(
    data: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    section = EvaluateSection(tasks=["arc_easy"], path=str(data), mode="rank", batch_size=5)
    [arc, _] = evaluate_model(constant_model(tokenizer, None), tokenizer, section, "alpaca", tmp_path)
    rows = predictions_of(tmp_path)
    assert [row["pred"] for row in rows] == ["answer1"] * 3
    assert [len(row["log_likelihoods"]) for row in rows] == [3, 4, 5]
    assert arc.value == pytest.approx(1 / 3)
    assert arc.extra["chance"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 5) / 3)
    num_tokens = len(ANSWER_PREFIX + "answer1")
    assert rows[0]["log_likelihoods"][0] == pytest.approx(-num_tokens * math.log(len(tokenizer)), rel=1e-5)


@pytest.mark.parametrize("template", ["alpaca", "alpaca_reference"])
def test_rank_mode_equals_one_forward_pass_per_option(
    data: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, template: str
) -> None:
    model = tiny_model(tokenizer).eval()
    section = EvaluateSection(tasks=["boolq"], path=str(data), mode="rank", batch_size=3)
    evaluate_model(model, tokenizer, section, template, tmp_path)
    for found in predictions_of(tmp_path):
        by_hand = []
        for label in ("true", "false"):
            prompt = tokenizer(render_prompt(found, template, for_evaluation=True))["input_ids"]
            option = tokenizer(ANSWER_PREFIX + label, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + option])).logits[0, len(prompt) - 1 : -1]
            by_hand.append(logits.log_softmax(-1)[range(len(option)), option].sum().item())
        assert found["log_likelihoods"] == pytest.approx(by_hand, abs=1e-3)
        assert found["pred"] == ("true" if by_hand[0] >= by_hand[1] else "false")


def test_the_config_hash_follows_what_can_change_a_score_and_nothing_else(
    data: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = constant_model(tokenizer, "solution1")

    def hashes(template: str = "alpaca", **changes: Any) -> tuple[str, str]:
        fields = {"tasks": ["piqa"], "path": str(data), "num_beams": 1, "max_new_tokens": 2, **changes}
        [metric, _] = evaluate_model(model, tokenizer, EvaluateSection(**fields), template, tmp_path)
        return metric.config_hash, metric.dataset_hash

    base = hashes()
    assert hashes(batch_size=1) == base
    assert hashes(max_new_tokens=3)[0] != base[0]
    assert hashes(mode="rank")[0] != base[0]
    assert hashes("alpaca_reference")[0] != base[0]
    assert hashes(limit=2)[0] == base[0]
    assert hashes(limit=2)[1] != base[1]


def test_an_unknown_task_is_refused_with_close_matches(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"llm/bolq.*Did you mean llm/boolq"):
        evaluate_model(None, None, EvaluateSection(tasks=["piqa", "bolq"]), "alpaca", tmp_path)
    with pytest.raises(ValueError, match=r"evaluate\.tasks is \[\]"):
        evaluate_model(None, None, EvaluateSection(tasks=[]), "alpaca", tmp_path)


def test_a_missing_file_is_named_together_with_its_source_before_anything_runs(data: Path, tmp_path: Path) -> None:
    section = EvaluateSection(tasks=["piqa", "arc_challenge"], path=str(data))
    with pytest.raises(ValueError, match=r"ARC-Challenge/test\.json.*github\.com/AGI-Edgerunners/LLM-Adapters"):
        evaluate_model(None, None, section, "alpaca", tmp_path)
    assert list(tmp_path.iterdir()) == []
