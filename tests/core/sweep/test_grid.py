"""Which runs a command line asks for, what they are called, and what is refused before any of them starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_core.config import ConfigError
from dora_core.registry import PIPELINES
from dora_core.sweep.grid import build_grid, split_values

LLM = PIPELINES.get("llm")
WORDS = ["--adapter.rank", "4,8,16", "--run.seed", "0,1,2", "--adapter.kind", "lora,dora", "--train.lr", "1e-3"]


def grid(*words: str, together: tuple[str, ...] = (), num_ranks: int = 1):
    return build_grid(LLM, "tiny", words, Path("out"), together, num_ranks)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("4,8, 16", ["4", "8", "16"]),
        ("lora", ["lora"]),
        ("[a,b]", ["[a,b]"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("{a: 1, b: [2,3]},{}", ["{a: 1, b: [2,3]}", "{}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ('["x,]",y],z', ['["x,]",y]', "z"]),
        ("it's,that's", ["it's", "that's"]),
        ("4,,8", ["4", "", "8"]),
        ("", [""]),
    ],
)
def test_values_are_split_at_commas_outside_of_brackets_and_quotes(text, values):
    assert split_values(text) == values


def test_every_combination_is_one_run_with_a_readable_name():
    found = grid(*WORDS)
    assert len(found.points) == 18 and len({point.name for point in found.points}) == 18
    assert [point.name for point in found.points[:3]] == ["rank4-seed0-lora", "rank4-seed0-dora", "rank4-seed1-lora"]
    point = found.points[-1]
    assert point.settings == {"adapter.rank": 16, "run.seed": 2, "adapter.kind": "dora"}
    assert (point.config.adapter.rank, point.config.run.seed, point.config.train.lr) == (16, 2, 1e-3)
    assert (point.config.run.name, point.config.run.root) == ("rank16-seed2-dora", "out")
    assert point.config.evaluate.after_training and point.config.run.resume == "auto"
    assert (found.seeds, found.compared, found.drawn) == (("run.seed",), ("adapter.kind",), ("adapter.rank",))


@pytest.mark.parametrize("name", PIPELINES.names())
def test_the_tiny_recipe_of_every_pipeline_can_be_swept(name):
    found = build_grid(PIPELINES.get(name), "tiny", ["--adapter.rank", "4,8"], Path("out"))
    assert [point.name for point in found.points] == ["rank4", "rank8"]
    assert all(point.config.evaluate.after_training for point in found.points)


def test_names_do_not_depend_on_the_order_of_the_options_or_on_how_a_number_is_written():
    names = {point.name for point in grid("--train.lr", "1e-3,2e-3", "--adapter.rank", "4,8").points}
    assert names == {point.name for point in grid("--adapter.rank", "8,4", "--train.lr=0.002,0.001").points}
    assert "rank4-lr0.001" in names


def test_values_that_are_no_plain_words_have_names_of_their_own():
    words = ["--adapter.targets", "[q_proj,v_proj],[q_proj],.*q_proj", "--adapter.rslora", "true,false"]
    names = [point.name for point in grid(*words, "--run.seed", "0,1", "--adapter.seed", "0,1").points]
    assert len(set(names)) == 24 and all("/" not in name and len(name) < 100 for name in names)
    assert names[0].startswith("rslora_true-adapter_seed0-targets_q_proj_v_proj.") and names[0].endswith("-run_seed0")


def test_fields_vary_together_and_play_one_role():
    words = ["--adapter.rank", "4,8", "--adapter.alpha", "8,16", "--run.seed", "0,1", "--adapter.seed", "5,6"]
    found = grid(*words, together=("adapter.rank,adapter.alpha", "run.seed,adapter.seed"))
    pairs = [(point.config.adapter.rank, point.config.adapter.alpha) for point in found.points]
    assert pairs == [(4, 8.0), (4, 8.0), (8, 16.0), (8, 16.0)]
    assert found.seeds == ("run.seed", "adapter.seed") and found.drawn == ("adapter.rank", "adapter.alpha")
    assert found.compared == ()


def test_without_the_kind_the_first_field_that_is_no_number_is_compared():
    found = grid("--train.lr", "1e-3,2e-3", "--train.schedule", "linear,cosine", "--adapter.bias", "none,all")
    assert found.compared == ("train.schedule",) and found.drawn == ("train.lr",) and found.seeds == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "No field has several values"),
        (["--adapter.rank", "4,0"], "adapter.rank is 0; it must be a positive integer"),
        (["--adapter.rnk", "4,8"], "Unknown key 'adapter.rnk'. Did you mean adapter.rank"),
        (["--adapter.kind", "lora,dra"], "adapter.kind is 'dra'"),
        (["--adapter.rank", "4,8", "--train.lr", "fast"], "train.lr is 'fast'"),
        (["--adapter.rank", "4,8", "--run.root", "x"], "--run.root is 'x', but a sweep sets it itself. Its runs go"),
        (["--run.name", "a,b"], "--run.name is 'a,b', but a sweep sets it itself"),
        (["--adapter.rank", "4,8", "--evaluate.after_training=false"], "leave --evaluate.after_training out"),
        (["--adapter.rank", "4", "--adapter.rank", "8"], "--adapter.rank is given twice"),
        (["--adapter.rank", "4,8,"], "--adapter.rank '4,8,' has an empty value"),
        (["--train.lr", "1e-3,0.001"], "Two runs would be lr0.001: a field has a value twice"),
        (["--adapter.rank", "4,8", "tiny"], "Unexpected argument 'tiny'"),
        (["--train.micro_batch_size", "4,3"], "does not divide into micro-batches of 3 rows on 1 ranks"),
    ],
)
def test_a_mistake_is_one_message(words, message):
    with pytest.raises(ConfigError) as caught:
        grid(*words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("together", "message"),
    [
        ("adapter.rank,run.seed", "Fields that vary together need equally many values, but adapter.rank has 3, run.se"),
        ("adapter.rank,train.lr", "--together names train.lr; it must name fields with several values"),
        ("adapter.rank,adapter.rank", "--together names adapter.rank; it must name"),
    ],
)
def test_fields_that_cannot_vary_together_are_refused(together, message):
    with pytest.raises(ConfigError) as caught:
        grid("--adapter.rank", "4,8,16", "--run.seed", "0,1", "--train.lr", "1e-3", together=(together,))
    assert message in str(caught.value)
