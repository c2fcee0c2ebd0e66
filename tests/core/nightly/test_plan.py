"""``nightly.yaml``: what is found, what is refused, and the command of an entry."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dora_core.nightly.plan import find_plan, read_plan, select
from dora_core.registry import PIPELINES

ENTRY = "entries:\n  - {name: a, recipe: tiny, time_limit_s: 60"


def test_every_pipeline_of_the_checkout_has_entries_that_load():
    planned = find_plan()
    assert {each.pipeline for each in planned} >= set(PIPELINES.names()) >= {"llm", "vlm", "video"}
    assert len({each.name for each in planned}) == len(planned)
    assert all(each.script.is_file() for each in planned)


def test_an_entry_says_how_to_repeat_it():
    [llm] = select(find_plan(), "llm/tiny_dora")
    prepare, train = llm.reproduce().split(" && ")
    assert prepare == "dora prepare llm data/world"
    words = shlex.split(train)
    assert words[:6] == ["deepspeed", "--num_gpus", "1", "pipelines/llm/train.py", "--config", "tiny"]
    assert words[words.index("--evaluate.after_training") + 1] == "true"


def test_values_of_overrides_reach_the_recipe_as_they_are(tmp_path, write_plan):
    write_plan(
        tmp_path / "pipelines" / "llm",
        ENTRY + ", overrides: {train.betas: [0.9, 0.95], data.pack_length: null, data.train: ['a b.json'], "
        "run.deterministic: true, train.lr: 1e-4}}\n",
    )
    [planned] = read_plan("llm", tmp_path / "pipelines" / "llm")
    assert planned.arguments() == [
        "--config", "tiny",
        "--train.betas", "[0.9, 0.95]", "--data.pack_length", "null", "--data.train", '["a b.json"]',
        "--run.deterministic", "true", "--train.lr", "0.0001",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entry: []\n", "it must have one, entries"),
        ("entries: [tiny]\n", r"entries\[0\] is 'tiny'; it must be a mapping"),
        (ENTRY + ", retries: 2}\n", r"entries\[0\]: Unknown key 'retries'"),
        ("entries:\n  - {name: a, recipe: tiny}\n", r"entries\[0\] has no time_limit_s"),
        (ENTRY + ", bands: {tokens_per_s: {flor: 1}}}\n", "flor"),
        (ENTRY + ", bands: {tokens_per_s: {floor: -1}}}\n", "floor is -1.0; it must be 0 or more"),
        (ENTRY + ", data: [abc]}\n", "it must be a list of hashes of 8 or more characters"),
        (ENTRY + ", setup: download}\n", "setup is 'download'"),
        (ENTRY + ", overrides: {train.max_step: 3}}\n", "entry 'a'.*Unknown key 'train.max_step'"),
        (ENTRY + ", overrides: {run.name: mine}}\n", "overrides run.name; the night sets it"),
        (ENTRY + "}\n  - {name: a, recipe: tiny, time_limit_s: 60}\n", "two entries are called 'a'"),
        (ENTRY.replace("recipe: tiny", "recipe: tny") + "}\n", "Did you mean tiny"),
    ],
)
def test_a_mistake_is_an_error_with_its_place(tmp_path, write_plan, text, message):
    path = write_plan(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_plan("llm", tmp_path)
    assert str(caught.value).startswith(str(path))


def test_only_takes_a_pipeline_or_an_entry():
    planned = find_plan()
    assert {each.pipeline for each in select(planned, "vlm")} == {"vlm"}
    assert select(planned, None) == planned
    with pytest.raises(ValueError, match=r"Unknown entry 'llm/tiny'.*llm/tiny_dora"):
        select(planned, "llm/tiny")


def test_pinned_curves_in_the_checkout_are_of_entries():
    entries = {(each.folder, each.entry.name) for each in find_plan()}
    roots = {each.folder for each in find_plan()}
    files: list[Path] = [path for root in roots for path in root.glob("golden/*")]
    assert all((path.parents[1], path.stem) in entries for path in files)
