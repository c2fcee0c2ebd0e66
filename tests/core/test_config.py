from __future__ import annotations

import dataclasses
import io
import json
import math
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from dora_core.adapters.config import AdapterConfig
from dora_core.config import (
    ConfigError,
    DeepSpeedSection,
    LogSection,
    TrainSection,
    dump_config,
    find_recipe,
    load_config,
    merge_overrides,
    read_yaml,
    section,
    split_arguments,
    validate,
)
from dora_core.engine.distributed import World
from dora_core.engine.zero import resolve_zero, zero_configs
from dora_core.registry import PIPELINES, RegistryError


@section
class Inner:
    size: int
    rate: float = 0.5
    name: str = "inner"
    note: str | None = None
    pattern: list[str] | str = "a"
    items: list[str] = field(default_factory=list)
    table: dict[str, Any] = field(default_factory=dict)
    flag: bool = False
    limit: int | None = None


@section
class Outer:
    inner: Inner
    adapter: AdapterConfig = field(default_factory=AdapterConfig)


@pytest.fixture
def load(tmp_path):
    """Write recipes given as text and load the one called ``recipe``."""

    def load_texts(*overrides: str, **texts: str) -> Outer:
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return load_config(Outer, "recipe", overrides, recipes=tmp_path)

    return load_texts


def world_of(size: int) -> World:
    return World(rank=0, size=size, local_rank=0, device=torch.device("cpu"))


# Recipe, base and command line


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_its_base(load):
    config = load(
        "--inner.rate",
        "0.3",
        recipe="base: common\ninner: {rate: 0.2, name: recipe}\n",
        common="inner: {size: 1, rate: 0.1, name: common, note: common}\n",
    )
    assert config.inner == Inner(size=1, rate=0.3, name="recipe", note="common")


def test_a_base_merges_section_by_section_and_replaces_lists(load):
    config = load(
        recipe="base: common.yaml\ninner: {items: [c], table: {y: 2}}\n",
        common="inner: {size: 1, items: [a, b], table: {x: 1}}\n",
    )
    assert config.inner.items == ["c"]
    assert config.inner.table == {"x": 1, "y": 2}


def test_an_empty_section_says_nothing(load):
    assert load(recipe="base: common\ninner:\n", common="inner: {size: 4}\n").inner.size == 4
    assert load("--adapter.rank", "3", recipe="inner: {size: 1}\nadapter:\n").adapter.rank == 3


@pytest.mark.parametrize(
    ("recipe", "common", "message"),
    [
        ("base: common", "base: other\n", r"its base common\.yaml has a base itself\. One level is the limit"),
        ("base: missing", "", r"base 'missing' is not a file beside it"),
        ("base: [a, b]", "", r"base is \['a', 'b'\]; it must be the file name of one other recipe"),
        ("[1, 2]", "", r"recipe\.yaml holds a list; a recipe is a mapping of sections"),
    ],
)
def test_a_recipe_of_the_wrong_form_is_refused(load, recipe, common, message):
    with pytest.raises(ConfigError, match=message):
        load(recipe=recipe, common=common)


def test_a_recipe_is_found_by_name_and_by_path_and_an_unknown_one_gets_close_matches(tmp_path):
    (tmp_path / "small.yaml").write_text("")
    assert find_recipe("small", tmp_path) == find_recipe(tmp_path / "small.yaml", tmp_path) == tmp_path / "small.yaml"
    with pytest.raises(RegistryError, match=r"Unknown recipe 'smal'\. Did you mean small\?"):
        find_recipe("smal", tmp_path)


# YAML


def test_a_number_in_scientific_notation_is_a_number_in_yaml_and_on_the_command_line(load):
    assert load(recipe="inner: {size: 1, rate: 1e-4}").inner.rate == 1e-4
    assert load("--inner.rate", "2e-4", recipe="inner: {size: 1}").inner.rate == 2e-4
    raw: dict[str, Any] = {}
    merge_overrides(raw, ["--a.b=1e-4"])
    assert raw == {"a": {"b": 1e-4}} and isinstance(raw["a"]["b"], float)


def test_a_key_given_twice_is_refused_with_its_line(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("inner:\n  size: 1\n  rate: 0.1\n  size: 2\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml, line 4: not valid YAML: found duplicate key \"size\""):
        read_yaml(file)


def test_text_that_is_not_yaml_or_not_utf8_is_refused_with_the_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("inner:\n  size: [1\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml, line 3: not valid YAML"):
        read_yaml(file)
    file.write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not UTF-8"):
        read_yaml(file)


def test_an_object_tag_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(tmp_path / "recipe.yaml")


# Schema


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--inner.sise", "1"], r"Unknown key 'inner\.sise'\. Did you mean inner\.size\?"),
        (["--iner.size", "1"], r"Unknown key 'iner'\. Did you mean inner\?"),
        (["--adapter.rnak", "1"], r"Unknown key 'adapter\.rnak'\. Did you mean adapter\.rank"),
        (["--inner.size", "many"], r"inner\.size is 'many': Input should be a valid integer"),
        (["--inner.size", "1.5"], r"inner\.size is 1\.5: Input should be a valid integer"),
        (["--inner.size", "true"], r"inner\.size is True; it must be a number or absent"),
        (["--inner.rate", "false"], r"inner\.rate is False; it must be a number"),
        (["--inner.limit", "true"], r"inner\.limit is True; it must be a number or absent"),
        (["--inner.rate", ".inf"], r"inner\.rate is inf: Input should be a finite number"),
        (["--inner.rate", ".nan"], r"inner\.rate is nan: Input should be a finite number"),
        (["--inner.flag", "perhaps"], r"inner\.flag is 'perhaps': Input should be a valid boolean"),
        (["--inner.items", "a"], r"inner\.items is 'a'; it must be a list\. Write \[a\]\."),
        (["--adapter.rank", "0"], r"adapter\.rank is 0; it must be a positive integer\. Set for example"),
        (["--adapter.rank", "-3"], r"adapter\.rank is -3; it must be a positive integer"),
        (["--adapter.dropout", "1"], r"adapter\.dropout is 1\.0; it must be at least 0 and below 1"),
        (["--adapter.kind", "dorra"], r"adapter\.kind is 'dorra': Input should be 'dora'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(load, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(*overrides, recipe="inner: {size: 1}")
    assert "recipe.yaml with the command line: " in str(caught.value)


def test_a_required_field_that_is_absent_is_named_with_the_way_to_give_it(load):
    with pytest.raises(ConfigError, match=r"inner\.size is required and has no default.*--inner\.size VALUE"):
        load(recipe="inner: {rate: 0.1}")
    with pytest.raises(ConfigError, match=r"the defaults: inner is required"):
        load_config(Outer, None, [], recipes=Path())


def test_all_mistakes_are_listed_at_once(load):
    with pytest.raises(ConfigError) as caught:
        load("--inner.rate", "fast", "--adapter.rank", "0", "--other.x", "1", recipe="inner: {}")
    for key in ("inner.rate", "adapter.rank", "other", "inner.size"):
        assert key in str(caught.value)


# Overrides


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inner.size", "1"], r"Unexpected argument 'inner\.size'\. Overrides read --section\.field value"),
        (["--inner.size", "1", "2"], r"Unexpected argument '2'"),
        (["--inner.size"], r"--inner\.size has no value\. Write --inner\.size VALUE"),
        (["--inner.size", "--inner.rate", "1"], r"--inner\.size has no value"),
        (["--inner.items", "[a"], r"--inner\.items '\[a' is not a YAML value: .* put it in quotes twice"),
        (["--inner.size.more", "1"], r"--inner\.size\.more: size is a value, not a section"),
    ],
)
def test_an_override_of_the_wrong_form_is_refused(load, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(*overrides, recipe="inner: {size: 1}")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("items", "[a, b.c]", ["a", "b.c"]),
        ("items", "[]", []),
        ("table", "{x: 1, y: [true, null]}", {"x": 1, "y": [True, None]}),
        ("limit", "null", None),
        ("limit", "-3", -3),
        ("note", "null", None),
        ("note", "", ""),
        ("flag", "true", True),
        ("flag", "False", False),
        ("pattern", r".*\.(q|v)_proj$", r".*\.(q|v)_proj$"),
        ("pattern", "'[qv]_proj'", "[qv]_proj"),
        ("pattern", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("name", "7", "7"),
        ("name", "1e-4", "1e-4"),
        ("name", "2024-01-31", "2024-01-31"),
        ("name", "true", "true"),
        ("name", "/data/a b.json", "/data/a b.json"),
        ("name", "a=b", "a=b"),
    ],
)
def test_the_text_of_an_override_becomes_the_value_of_its_field(load, name, text, value):
    for overrides in ([f"--inner.{name}", text], [f"--inner.{name}={text}"]):
        got = getattr(load(*overrides, recipe="inner: {size: 1}").inner, name)
        assert got == value and type(got) is type(value)


def test_the_last_of_two_overrides_of_one_field_wins(load):
    assert load("--inner.size", "2", "--inner.size=3", recipe="").inner.size == 3


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30)


@settings(deadline=None)
@given(scalars)
@example("\x85")
def test_any_yaml_scalar_typed_on_the_command_line_round_trips(value):
    buffer = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_unicode = False
    yaml.dump([value], buffer)
    typed = buffer.getvalue().strip()[1:-1] if buffer.getvalue().startswith("[") else buffer.getvalue()[2:].rstrip("\n")
    raw: dict[str, Any] = {}
    merge_overrides(raw, [f"--a.b={typed}"])
    assert raw == {"a": {"b": value}} and type(raw["a"]["b"]) is type(value)


@settings(deadline=None)
@given(
    st.text(min_size=1, max_size=20),
    scalars,
    st.lists(st.text(max_size=8), max_size=3),
    st.dictionaries(st.text(), scalars),
)
@example("run", "\x85", ["\u2028", "é 数据"], {})
@example("run", None, [], {"0" * 117 + " 0": None})
def test_a_dumped_configuration_reloads_to_an_equal_one(tmp_path_factory, name, scalar, items, table):
    table["scalar"] = scalar
    config = Outer(inner=Inner(size=1, name=name, note=name, pattern=items or name, items=items, table=table))
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8", newline="")
    assert load_config(Outer, path, recipes=Path()) == config


# The arguments of a training script


@pytest.mark.parametrize("local_rank", [["--local_rank=0"], ["--local_rank", "0"], ["--local-rank=1"], []])
def test_the_local_rank_of_a_launcher_is_dropped(local_rank):
    words = [*local_rank, "--config", "tiny", "--train.lr", "1e-4", "--run.name=a=b"]
    assert split_arguments(words) == ("tiny", ["--train.lr", "1e-4", "--run.name=a=b"])
    assert split_arguments(["--config=a/b.yaml", "--train.lr", "1", *local_rank]) == ("a/b.yaml", ["--train.lr", "1"])


@pytest.mark.parametrize("words", [["--config"], ["--config="], ["--config", "--train.lr", "1"]])
def test_a_config_without_a_value_is_refused(words):
    with pytest.raises(ConfigError, match="--config has no value"):
        split_arguments(words)


def test_a_config_given_twice_is_refused():
    with pytest.raises(ConfigError, match="--config is given twice: a and b"):
        split_arguments(["--config", "a", "--config=b"])


# Training numbers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0}, r"train\.lr is 0\.0; it must be positive"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, r"train\.warmup_ratio is 0\.1; .*Give the warm-up once"),
        ({"warmup_ratio": 1.0}, r"train\.warmup_ratio is 1\.0; it must be in \[0, 1\)"),
        ({"warmup_steps": -1}, r"train\.warmup_steps is -1; it must be 0 or more"),
        ({"betas": [0.9, 1.0]}, r"train\.betas is \(0\.9, 1\.0\); it must be two numbers in \[0, 1\)"),
        ({"weight_decay": -0.1}, r"train\.weight_decay is -0\.1"),
        ({"magnitude_weight_decay": -0.1}, r"train\.magnitude_weight_decay is -0\.1"),
        ({"magnitude_lr": 0}, r"train\.magnitude_lr is 0\.0"),
        ({"b_lr_ratio": 0}, r"train\.b_lr_ratio is 0\.0"),
        ({"eps": 0}, r"train\.eps is 0\.0"),
        ({"num_epochs": 0}, r"train\.num_epochs is 0\.0"),
        ({"clip_grad_norm": 0}, r"train\.clip_grad_norm is 0\.0; it must be positive, or null"),
        *(
            ({name: 0}, rf"train\.{name} is 0; it must be a positive integer")
            for name in ("global_batch_size", "micro_batch_size", "log_every", "keep_last")
        ),
        *(
            ({name: 0}, rf"train\.{name} is 0; it must be a positive integer or absent")
            for name in ("max_steps", "eval_every", "save_every")
        ),
    ],
)
def test_a_training_number_out_of_range_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        validate(TrainSection, {"lr": 1e-3, **values}, "here")


@pytest.mark.parametrize(
    ("rows", "micro", "ranks", "accumulation"), [(16, 16, 1, 1), (16, 2, 2, 4), (16, 4, 4, 1), (6, 1, 3, 2)]
)
def test_accumulation_follows_from_batch_sizes_and_ranks(rows, micro, ranks, accumulation):
    train = TrainSection(lr=1.0, global_batch_size=rows, micro_batch_size=micro)
    assert train.accumulation(ranks) == accumulation


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16))
def test_a_world_size_that_does_not_divide_gets_a_proposal_that_works(rows, micro, ranks):
    train = TrainSection(lr=1.0, global_batch_size=rows, micro_batch_size=micro)
    if rows % (micro * ranks) == 0:
        return
    with pytest.raises(ConfigError, match=f"global_batch_size {rows} does not divide .* on {ranks} ranks") as caught:
        train.accumulation(ranks)
    proposal = str(caught.value).rpartition("Use ")[2].rstrip(".")
    if rows % ranks:
        assert proposal == f"a train.global_batch_size that is a multiple of {ranks}"
    else:
        size = int(proposal.removeprefix("train.micro_batch_size: "))
        assert 0 < size <= micro
        assert dataclasses.replace(train, micro_batch_size=size).accumulation(ranks) * size * ranks == rows


# Every recipe


RECIPES = [(name, path) for name in PIPELINES.names() for path in sorted(PIPELINES.get(name).recipes.glob("*.yaml"))]


def test_every_pipeline_has_recipes():
    assert {name for name, _ in RECIPES} == set(PIPELINES.names()) != set()


@pytest.mark.parametrize(("pipeline", "path"), RECIPES, ids=[f"{name}/{path.stem}" for name, path in RECIPES])
def test_every_recipe_loads_and_its_dump_reloads_to_an_equal_object(pipeline, path, tmp_path):
    owner = PIPELINES.get(pipeline)
    config = load_config(owner.config, path.stem, recipes=owner.recipes)
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(owner.config, tmp_path / "config.yaml", recipes=owner.recipes) == config
    assert config.run.name == path.stem
    assert config.deepspeed.config in zero_configs()


# DeepSpeed's JSON


def test_every_shipped_deepspeed_configuration_resolves():
    found = zero_configs()
    on_disk = Path(__file__).parents[2].glob("deepspeed_configs/*.json")
    assert set(found) == {path.stem for path in on_disk} and len(found) > 0
    train = TrainSection(lr=1.0, global_batch_size=8, micro_batch_size=2, clip_grad_norm=0.5)
    for name in found:
        zero = resolve_zero(DeepSpeedSection(config=name), train, world_of(2))
        assert f"zero{zero.stage}" == name[:5]
        assert zero.config["gradient_accumulation_steps"] == 2
        assert zero.config["train_micro_batch_size_per_gpu"] == 2
        assert math.isclose(zero.config["gradient_clipping"], 0.5 if zero.stage else 0.0)


def test_extra_settings_are_merged_into_the_stage():
    given = DeepSpeedSection(config="zero3", extra={"stage3_param_persistence_threshold": 0})
    zero = resolve_zero(given, TrainSection(lr=1.0), world_of(1))
    assert zero.config["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert zero.config["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("key", "field_name"),
    [
        ("train_batch_size", "train.global_batch_size"),
        ("train_micro_batch_size_per_gpu", "train.micro_batch_size"),
        ("gradient_accumulation_steps", "train.global_batch_size and train.micro_batch_size"),
        ("optimizer", "train.optimizer"),
        ("scheduler", "train.schedule"),
        ("gradient_clipping", "train.clip_grad_norm"),
        ("fp16", "train.precision"),
        ("bf16", "train.precision"),
        ("torch_autocast", "train.precision"),
    ],
)
def test_a_json_that_says_what_the_recipe_says_is_refused_with_the_recipes_field(tmp_path, key, field_name):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: {}}))
    with pytest.raises(ConfigError, match=rf"{key}.*recipe's to say\. Remove it there and set {field_name}\."):
        resolve_zero(DeepSpeedSection(config=str(file)), TrainSection(lr=1.0), world_of(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": 4}}', r"zero_optimization\.stage is 4; it must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {}}', r"zero_optimization\.stage is None"),
        ("{}", r"zero_optimization\.stage is None"),
        ('{"zero_optimization": ', r"zero\.json is not valid JSON"),
    ],
)
def test_a_json_of_the_wrong_form_is_refused(tmp_path, text, message):
    (tmp_path / "zero.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve_zero(DeepSpeedSection(config=str(tmp_path / "zero.json")), TrainSection(lr=1.0), world_of(1))


def test_an_unknown_deepspeed_configuration_gets_close_matches():
    with pytest.raises(RegistryError, match=r"Unknown DeepSpeed configuration 'zero_2'\. Did you mean zero2"):
        resolve_zero(DeepSpeedSection(config="zero_2"), TrainSection(lr=1.0), world_of(1))


def test_ranks_that_do_not_divide_the_batch_are_refused():
    train = TrainSection(lr=1.0, global_batch_size=16, micro_batch_size=8)
    with pytest.raises(ConfigError, match=r"16 does not divide .* 8 rows on 4 ranks\. Use train\.micro_batch_size: 4"):
        resolve_zero(DeepSpeedSection(), train, world_of(4))


def test_the_first_step_cannot_be_profiled():
    with pytest.raises(ValueError, match=r"log\.profile_step is 1; it must be 2 or more, or absent"):
        LogSection(profile_step=1)
