"""The synthetic world: its file format, its split, its balance, its truth, and the tiny models that go with it."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_core.testing import world as world_module
from dora_core.testing.formats import PHRASES
from dora_core.testing.tiny import save_tiny_llama, tiny_llama, train_tokenizer
from dora_core.testing.world import TASKS, World, write_world

OPENINGS = {
    "boolq": "Please answer the following question with true or false, question: ",
    "piqa": "Please choose the correct solution to the question: ",
    "hellaswag": "Please choose the correct ending to complete the given sentence: ",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: ",
}
OPTIONS = {
    "boolq": ("", "\n\n", "true/false"),
    "piqa": ("Solution1: A\n\nSolution2: A", "\n\n", "solution1/solution2"),
    "social_i_qa": ("Answer1: A Answer2: A Answer3: A", "\n\n", "answer1/answer2/answer3"),
    "hellaswag": (
        "Ending1: A Ending2: A Ending3: A Ending4: A",
        "\n\n",
        "ending1/ending2/ending3/ending4",
    ),
    "winogrande": ("Option1: A Option2: A", " ", "option1/option2"),
}
FOUR = ("Answer1: A Answer2: A Answer3: A Answer4: A", "\n\n", "answer1/answer2/answer3/answer4")
SPLITS = ("train", "test")


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def pairs_in(world: World, instruction: str) -> set[tuple[str, str]]:
    """Every (entity, attribute) that an instruction is about."""
    found = words(instruction)
    return {(name, noun) for name in world.names for noun in world.values if name in found and noun in found}


def options_of(instruction: str) -> list[str]:
    return re.findall(r"(?:Answer|Solution|Ending|Option)\d: (\w+)", instruction)


@pytest.mark.parametrize("task", TASKS)
def test_instructions_follow_the_template_literally(world: World, task: str) -> None:
    opening = OPENINGS.get(task, "Please choose the correct answer to the question: ")
    body, gap, labels = OPTIONS.get(task, FOUR)
    if task == "boolq":
        pattern = re.escape(opening) + r"[^\n]+\?\n\nAnswer format: true/false"
    else:
        listed = re.escape(body).replace("A\\ ", r"\w+\ ").replace("A\\\n", "\\w+\\\n")
        listed = re.sub(r"A$", r"\\w+", listed)
        pattern = re.escape(opening) + r"[^\n]+\n\n" + listed + re.escape(f"{gap}Answer format: {labels}")
    for row in world.rows(task, "train", 40) + world.rows(task, "test", 24):
        assert list(row) == ["instruction", "input", "output", "answer"]
        assert re.fullmatch(pattern, row["instruction"]), row["instruction"]
        assert row["input"] == ""
        assert row["output"] == f"the correct answer is {row['answer']}"
        assert row["answer"] in labels.split("/")


def test_no_pair_of_a_test_row_occurs_in_a_training_row_of_any_task(world: World) -> None:
    asked = {split: set() for split in SPLITS}
    for split in SPLITS:
        for task in TASKS:
            for row in world.rows(task, split, 200 if split == "train" else 40):
                pairs = pairs_in(world, row["instruction"])
                assert pairs
                asked[split] |= pairs
    assert asked["train"].isdisjoint(asked["test"])
    assert asked["test"] <= world.held_out
    assert asked["test"] | asked["train"] <= {(n, a) for n in world.names for a in world.values}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_labels_are_balanced_and_cover_every_position(world: World, task: str, split: str) -> None:
    num_labels = len(OPTIONS.get(task, FOUR)[2].split("/"))
    counts = Counter(row["answer"] for row in world.rows(task, split, 24))
    assert set(counts.values()) == {24 // num_labels}
    assert len(counts) == num_labels


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_the_gold_answer_is_the_only_option_that_the_facts_allow(world: World, task: str, split: str) -> None:
    values = {value for its in world.values.values() for value in its}
    for row in world.rows(task, split, 24):
        question = row["instruction"].split("\n\n")[0]
        (noun,) = words(question) & set(world.values)
        names = words(question) & set(world.names)
        stated = words(question) & values
        if task == "boolq":
            assert row["answer"] == ("true" if stated == {world.facts[names.pop(), noun]} else "false")
            continue
        options = options_of(row["instruction"])
        assert len(set(options)) == len(options)
        if names:
            (name,) = names
            right = [option == world.facts[name, noun] for option in options]
            assert set(options) <= set(world.values[noun])
        else:
            right = [{world.facts[option, noun]} == stated for option in options]
        assert sum(right) == 1
        assert row["answer"].endswith(str(right.index(True) + 1))


def test_the_statements_state_every_fact_and_contradict_none(world: World) -> None:
    statements = world.statements(2000)
    assert len(statements) == 2000
    for (name, noun), value in world.facts.items():
        assert f"The {noun} of {name} is {value}." in statements
    for text in statements:
        for name, value in re.findall(r"^The \w+ of (\w+) is (\w+)\.$", text):
            assert value in {world.facts.get((name, noun)) for noun in world.values}


def test_no_statement_holds_a_gold_output(world: World) -> None:
    text = "\n".join(world.statements(2000))
    assert not re.search(r"the correct answer is (?:true|false|(?:answer|solution|ending|option)\d)", text)


def test_the_world_is_written_alike_under_any_hash_seed(tmp_path: Path) -> None:
    source = Path(world_module.__file__).parents[2]
    script = (
        f"import sys; sys.path.insert(0, {str(source)!r}); from dora_core.testing.world import write_world; "
        "write_world(sys.argv[1], seed=3, num_train_per_task=12, num_test_per_task=12, num_statements=400)"
    )
    for folder, hash_seed in (("a", "1"), ("b", "2")):
        command = [sys.executable, "-c", script, str(tmp_path / folder)]
        subprocess.run(command, check=True, env={"PYTHONHASHSEED": hash_seed})
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.json"))
    assert len(files) == 2 * len(TASKS) + 2
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_files_have_the_layout_of_the_data_sets(tmp_path: Path) -> None:
    write_world(tmp_path, num_train_per_task=12, num_test_per_task=12, num_statements=400)
    text = (tmp_path / "boolq" / "train.json").read_text()
    assert text.startswith('[\n    {\n        "instruction": "Please answer')
    assert text.endswith('"\n    }\n]')
    mix = json.loads((tmp_path / "commonsense_mix.json").read_text())
    train = [row for task in TASKS for row in json.loads((tmp_path / task / "train.json").read_text())]
    assert mix != train
    assert sorted(map(str, mix)) == sorted(map(str, train))
    statements = json.loads((tmp_path / "statements.json").read_text())
    assert len(statements) == 400
    assert all(
        list(row) == ["instruction", "input", "output", "answer"] and row["output"] and not row["instruction"]
        for row in statements
    )


def test_another_seed_makes_another_world() -> None:
    assert World(0).facts != World(1).facts
    assert World(0).rows("piqa", "train", 8) == World(0).rows("piqa", "train", 8)


def test_sizes_that_cannot_fill_the_formats_are_refused(world: World) -> None:
    with pytest.raises(ValueError, match="num_values"):
        World(num_values=3)
    with pytest.raises(ValueError, match="held-out"):
        World(held_out_fraction=0.9)
    with pytest.raises(ValueError, match="num_statements"):
        world.statements(10)
    with pytest.raises(ValueError, match="split"):
        world.rows("piqa", "dev", 4)
    with pytest.raises(ValueError, match="fewer"):
        world.rows("piqa", "test", 5000)


def test_a_saved_tiny_llama_and_its_tokenizer_load_again(tmp_path: Path, world: World) -> None:
    texts = world.statements(400) + [row["instruction"] for row in world.rows("piqa", "train", 20)]
    model, _ = save_tiny_llama(tmp_path, texts, hidden=32, layers=1, heads=2, phrases=PHRASES)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.is_fast
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, None)
    for text in [*texts, "a\n\n\nb   c\t  Solution1:\n é 漢 ", "</ s> ### Response:\n"]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids[1:]) == text
    known = {*world.names, *world.values, *(value for its in world.values.values() for value in its)}
    assert all(len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1 for word in known)
    assert all(len(tokenizer(phrase, add_special_tokens=False).input_ids) == 1 for phrase in PHRASES)
    encoded = tokenizer(texts[-1] + PHRASES[1] + "end", return_offsets_mapping=True)
    spelled = [(texts[-1] + PHRASES[1] + "end")[start:end] for start, end in encoded.offset_mapping]
    assert "".join(spelled) == texts[-1] + PHRASES[1] + "end"
    assert PHRASES[1] in spelled
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    input_ids = torch.tensor([tokenizer(texts[0]).input_ids])
    assert torch.equal(model.eval()(input_ids).logits, loaded.eval()(input_ids).logits)
    assert loaded.config.pad_token_id == tokenizer.pad_token_id


def test_tiny_weights_depend_on_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (tiny_llama(300, hidden=16, layers=1, heads=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_impossible_tiny_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="heads"):
        tiny_llama(300, hidden=10, heads=4)
    with pytest.raises(ValueError, match="vocab_size"):
        train_tokenizer(["a"], 100, tmp_path)
