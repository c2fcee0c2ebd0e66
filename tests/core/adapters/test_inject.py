"""What is adapted, what is refused and why, and what the report counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dora_core.adapters import (
    AdapterConfig,
    AdapterError,
    DoRALinear,
    LoRALinear,
    apply_adapters,
    parameter_groups,
    save_adapter,
)
from dora_core.registry import ADAPTERS

ATTENTION = "model.layers.{}.self_attn.{}"


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def message(model: nn.Module, **config: object) -> str:
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(AdapterError) as caught:
        apply_adapters(model, AdapterConfig(**config))
    assert not adapted(model)
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return str(caught.value)


def test_a_list_holds_suffixes_of_whole_name_parts(llama) -> None:
    model = llama()
    apply_adapters(model, AdapterConfig(targets=["q_proj", "layers.1.mlp.up_proj"]))
    assert set(adapted(model)) == {
        ATTENTION.format(0, "q_proj"),
        ATTENTION.format(1, "q_proj"),
        "model.layers.1.mlp.up_proj",
    }
    assert "matches" not in message(llama(), targets=["proj"])  # no part of a name


def test_a_string_is_one_regular_expression_for_the_whole_name(llama) -> None:
    model = llama()
    apply_adapters(model, AdapterConfig(targets=r".*\.1\.self_attn\.[qk]_proj"))
    assert set(adapted(model)) == {ATTENTION.format(1, "q_proj"), ATTENTION.format(1, "k_proj")}
    assert "'q_proj'" in message(llama(), targets="q_proj")


def test_everything_else_is_frozen_and_modes_are_kept(llama) -> None:
    model = llama().train()
    model.model.layers[0].self_attn.eval()
    apply_adapters(model, AdapterConfig(targets=["q_proj"]))
    trained = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "magnitude"}
    assert [layer.training for layer in adapted(model).values()] == [False, True]


def test_a_pattern_that_matches_nothing_lists_what_could_have_been_meant(llama) -> None:
    text = message(llama(), targets=["q_proj", "up_prj"])
    assert "adapter.targets" in text and "'up_prj'" in text and "Did you mean up_proj" in text and "gate_proj" in text
    assert "adapter.magnitude_targets" in message(llama(), targets=["q_proj"], magnitude_targets=["o_prj"])
    assert "adapter.trainable" in message(llama(), targets=["q_proj"], trainable=["input_layer_norm"])
    assert "''" in message(llama(), targets=[""])


def test_a_broken_regular_expression_is_named(llama) -> None:
    assert "not a regular expression" in message(llama(), targets="(q_proj")
    assert "rank_pattern" in message(llama(), targets=["q_proj"], rank_pattern={"(q": 2})


def test_a_target_that_is_no_linear_layer_is_refused_by_name(llama) -> None:
    text = message(llama(), targets=["embed_tokens"])
    assert "model.embed_tokens, a Embedding" in text and "nn.Linear" in text and "q_proj" in text
    assert "LlamaAttention" in message(llama(), targets=["self_attn"])


def test_a_linear_layer_whose_owner_reads_its_weight_is_refused_by_name() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    text = message(model, targets=["mlp", "out_proj"])
    assert "attention.out_proj" in text and "NonDynamicallyQuantizableLinear" in text
    assert "attention.out_proj" in message(model, targets=".*(mlp|out_proj)")


def test_one_module_cannot_be_two_things(llama) -> None:
    assert "targets and magnitude_targets" in message(llama(), targets=["q_proj"], magnitude_targets=["q_proj"])
    text = message(llama(), targets=["q_proj"], trainable=["layers.0.self_attn.q_proj"])
    assert "targets and trainable" in text and ATTENTION.format(0, "q_proj") in text


def test_adapting_twice_is_refused(llama) -> None:
    model = llama()
    apply_adapters(model, AdapterConfig(targets=["q_proj"]))
    with pytest.raises(AdapterError, match=r"adapted already \(2 layers, first model.layers.0.self_attn.q_proj\)"):
        apply_adapters(model, AdapterConfig(targets=["v_proj"]))


def test_a_head_tied_to_the_embedding_is_refused_by_name(llama) -> None:
    text = message(llama(tie_embeddings=True), targets=["q_proj", "lm_head"])
    assert "lm_head shares its weight with model.embed_tokens" in text
    apply_adapters(llama(tie_embeddings=False), AdapterConfig(targets=["q_proj", "lm_head"]))


@pytest.mark.parametrize("pattern", ["first", "second", "third"])
def test_a_layer_that_appears_twice_is_refused_by_both_names(pattern: str) -> None:
    layer = nn.Linear(4, 4)
    same_weight = nn.Linear(4, 4)
    same_weight.weight = layer.weight
    model = nn.ModuleDict({"first": layer, "second": layer, "third": same_weight, "fourth": nn.Linear(4, 4)})
    text = message(model, targets=["fourth", pattern])
    assert all(name in text for name in ("first", "second", "third")) and "fourth" not in text


def test_magnitude_targets_train_the_magnitude_alone(llama) -> None:
    # Table 6: V on Q, K, V; m on all seven projections.
    model = llama()
    rest = ["o_proj", "gate_proj", "up_proj", "down_proj"]
    report = apply_adapters(
        model, AdapterConfig(rank=2, targets=["q_proj", "k_proj", "v_proj"], magnitude_targets=rest)
    )
    for name, layer in adapted(model).items():
        assert isinstance(layer, DoRALinear) and layer.magnitude.requires_grad
        assert (layer.lora_A is None and layer.rank == 0) == (name.rsplit(".", 1)[1] in rest)
    assert report.num_magnitude == 2 * (4 * 32 + 2 * 48 + 32) and report.num_low_rank == 2 * 3 * 2 * 64
    assert {line.kind for line in report.modules} == {"dora", "magnitude"}
    only = apply_adapters(llama(), AdapterConfig(targets=[], magnitude_targets=["q_proj"]))
    assert only.num_trainable == only.num_magnitude == 64


def test_trainable_extras_train_in_fp32_and_adapted_layers_inside_them_do_not(llama, tokens) -> None:
    model = llama().bfloat16()
    config = AdapterConfig(rank=2, targets=["q_proj"], trainable=["norm", "layers.0.self_attn"])
    report = apply_adapters(model, config)
    attention = model.model.layers[0].self_attn
    assert not attention.q_proj.weight.requires_grad and attention.q_proj.lora_A.requires_grad
    assert attention.o_proj.weight.requires_grad and attention.o_proj.weight.dtype == torch.float32
    assert attention.q_proj.weight.dtype == torch.bfloat16
    assert report.num_other == 32 + 3 * 32 * 32
    assert sum(line.num_trainable for line in report.modules) == report.num_trainable
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
            assert parameter.grad.any() or name.endswith("lora_A"), name


def test_rank_and_alpha_patterns_change_single_layers(llama) -> None:
    model = llama()
    config = AdapterConfig(
        rank=4,
        alpha=8,
        targets=["q_proj", "v_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 2, r"1\..*v_proj": 3},
        alpha_pattern={"v_proj": 6},
    )
    apply_adapters(model, config)
    ranks = {name: (layer.rank, layer.scale) for name, layer in adapted(model).items()}
    assert ranks == {
        ATTENTION.format(0, "q_proj"): (2, 4),
        ATTENTION.format(0, "v_proj"): (4, 1.5),
        ATTENTION.format(1, "q_proj"): (4, 2),
        ATTENTION.format(1, "v_proj"): (3, 2),
    }
    assert "'k_proj'" in message(llama(), targets=["q_proj"], rank_pattern={"k_proj": 2})


def test_rslora_divides_by_the_root_of_the_rank(llama) -> None:
    model = llama()
    apply_adapters(model, AdapterConfig(rank=4, alpha=8, rslora=True, targets=["q_proj"]))
    assert {layer.scale for layer in adapted(model).values()} == {4}


def test_options_reach_the_layers(llama) -> None:
    model = llama()
    config = AdapterConfig(targets=["q_proj"], dropout=0.1, dropout_mode="update", norm_gradient="full")
    apply_adapters(model, config)
    for layer in adapted(model).values():
        assert (layer.dropout, layer.dropout_mode, layer.norm_gradient) == (0.1, "update", "full")


def test_the_initial_factors_depend_on_seed_and_name_alone(llama) -> None:
    def factors(**config: object) -> dict[str, torch.Tensor]:
        model = llama()
        apply_adapters(model, AdapterConfig(rank=3, **config))
        return {name: layer.lora_A for name, layer in adapted(model).items()}

    one, other = factors(targets=["q_proj"]), factors(targets=["v_proj", "q_proj"], kind="lora")
    torch.randn(3)
    assert all(torch.equal(factor, other[name]) for name, factor in one.items())
    values = list(other.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    name = ATTENTION.format(0, "q_proj")
    assert not torch.equal(factors(targets=["q_proj"], seed=1)[name], one[name])


def test_full_trains_the_targets_own_weights_and_none_trains_nothing(llama) -> None:
    model = llama().bfloat16()
    report = apply_adapters(model, AdapterConfig(kind="full", targets=["q_proj", "norm"]))
    assert not adapted(model) and report.num_trainable == report.num_other == 2 * 32 * 32 + 32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert "own" in message(llama(), kind="full", targets=["self_attn"])
    model = llama()
    report = apply_adapters(model, AdapterConfig(kind="none"))
    assert report.num_trainable == 0 and report.share == 0 and "0.000 %" in str(report)
    assert report.num_total == sum(p.numel() for p in model.parameters())


def test_full_over_everything_counts_a_tied_weight_once(llama) -> None:
    model = llama(tie_embeddings=True)
    report = apply_adapters(model, AdapterConfig(kind="full", targets=".*"))
    assert report.num_trainable == report.num_total == sum(p.numel() for p in model.parameters())
    assert report.share == 1


def test_the_registry_holds_the_four_kinds() -> None:
    assert ADAPTERS.names() == ["dora", "full", "lora", "none"]


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({"rank": 0}, "rank"),
        ({"rank_pattern": {"q": -1}}, "rank_pattern"),
        ({"alpha": 0}, "alpha"),
        ({"alpha_pattern": {"q": 0}}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"kind": "lora", "magnitude_targets": ["q"]}, "magnitude_targets"),
        ({"targets": []}, "targets"),
        ({"targets": [], "trainable": ["norm"]}, "targets"),
        ({"kind": "full", "targets": ""}, "targets"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(change: dict, needed: str) -> None:
    with pytest.raises(ValueError, match=rf"^adapter\.{needed} is .*; it must be .*\. [A-Z].*\.$"):
        AdapterConfig(**change)
    assert dataclasses.replace(AdapterConfig(), rank=4).rank == 4


def test_parameter_groups_by_role(llama) -> None:
    model = llama()
    config = AdapterConfig(rank=2, targets=["q_proj"], magnitude_targets=["o_proj"], trainable=["lm_head", "norm"])
    apply_adapters(model, config)
    groups = parameter_groups(model, 1e-3, weight_decay=0.1, magnitude_lr=5e-4, b_lr_ratio=16, other_lr=1e-5)
    settings = {group["name"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in groups}
    assert settings == {
        "A": (1e-3, 0.1, 2),
        "B": (1.6e-2, 0.1, 2),
        "magnitude": (5e-4, 0.0, 4),
        "other": (1e-5, 0.1, 1),
        "other_1d": (1e-5, 0.0, 1),
    }
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW(groups)


def test_parameter_groups_by_default_share_the_rate_and_leave_empty_ones_out(llama) -> None:
    model = llama()
    apply_adapters(model, AdapterConfig(kind="lora", targets=["q_proj"]))
    groups = parameter_groups(model, 1e-3, weight_decay=0.1)
    assert [(group["name"], group["lr"]) for group in groups] == [("A", 1e-3), ("B", 1e-3)]
    model = llama()
    apply_adapters(model, AdapterConfig(targets=["q_proj"]))
    groups = parameter_groups(model, 1e-3, weight_decay=0.1, magnitude_weight_decay=0.2)
    assert groups[2]["name"] == "magnitude" and groups[2]["lr"] == 1e-3 and groups[2]["weight_decay"] == 0.2


LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
LLAMA3_8B = LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}


@pytest.mark.parametrize(
    ("shape", "kind", "rank", "count", "percent"),
    [
        (LLAMA_7B, "lora", 32, 56_098_816, 0.826),
        (LLAMA_7B, "dora", 32, 56_975_360, 0.838),
        (LLAMA_7B, "lora", 16, 28_049_408, 0.415),
        (LLAMA_7B, "dora", 16, 28_925_952, 0.427),
        (LLAMA_13B, "lora", 32, 87_818_240, 0.670),
        (LLAMA_13B, "dora", 32, 89_190_400, 0.681),
        (LLAMA3_8B, "lora", 32, 56_623_104, 0.700),
        (LLAMA3_8B, "dora", 32, 57_409_536, 0.710),
    ],
)
def test_the_counts_are_those_of_the_papers_models(
    shape: dict, kind: str, rank: int, count: int, percent: float
) -> None:
    # Every layer is alike, so two real ones give the numbers of all.
    num_layers = shape["num_hidden_layers"]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape | {"num_hidden_layers": 2}))
    report = apply_adapters(model, AdapterConfig(kind=kind, rank=rank))
    per_layer = sum(p.numel() for p in model.model.layers[1].parameters())
    total = report.num_total + (num_layers - 2) * per_layer
    assert report.num_trainable // 2 * num_layers == count
    assert round(100 * count / total, 3) == percent


def test_the_report_of_the_whole_llama_7b_prints_the_papers_count() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_7B))
    report = apply_adapters(model, AdapterConfig())
    assert (report.num_trainable, report.num_magnitude, report.num_other) == (56_975_360, 876_544, 0)
    assert round(100 * report.share, 3) == 0.838
    text = str(report)
    assert "56,975,360 of 6,795,390,976 (0.838 %)" in text and "876,544" in text
    assert len(text.splitlines()) == 8
    assert "down_proj" in text and "4096 x 11008" in text and "15,597,568" in text


def test_the_share_of_granular_tuning_is_the_papers() -> None:
    # Table 6: 0.39 % for LLaMA-7B with V on QKV and m on QKVOGUD.
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_7B))
    config = AdapterConfig(
        targets=["q_proj", "k_proj", "v_proj"], magnitude_targets=["o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert round(100 * apply_adapters(model, config).share, 2) == 0.39


class Tower(nn.Module):
    """A language model and a tower whose layers have the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.language = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
        self.vision_tower = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})


@pytest.mark.parametrize("exclude", [["vision_tower.q_proj"], r"vision_tower\..*"])
def test_excluded_modules_are_never_targets_and_peft_excludes_them_too(exclude, tmp_path):
    model = Tower()
    config = AdapterConfig(rank=2, targets=["q_proj"], exclude=exclude)
    report = apply_adapters(model, config)
    assert [module.name for module in report.modules] == ["language.q_proj"]
    save_adapter(model, config, tmp_path)
    loaded = PeftModel.from_pretrained(Tower(), tmp_path)
    assert {name for name, module in loaded.named_modules() if hasattr(module, "lora_A")} == {
        "base_model.model.language.q_proj"
    }


def test_a_pattern_that_matches_excluded_modules_alone_is_an_error():
    with pytest.raises(AdapterError, match=r"Unknown pattern 'vision_tower\.q_proj'"):
        apply_adapters(Tower(), AdapterConfig(targets=["vision_tower.q_proj"], exclude=r"vision_tower\..*"))
    with pytest.raises(ValueError, match=r"adapter\.exclude is"):
        AdapterConfig(exclude="(")


def test_excluded_modules_may_still_be_trained_as_they_are():
    model = Tower()
    apply_adapters(
        model, AdapterConfig(rank=2, targets=["v_proj"], exclude=r"vision_tower.*", trainable=["vision_tower"])
    )
    assert model.vision_tower["q_proj"].weight.requires_grad
