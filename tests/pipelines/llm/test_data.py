"""Templates are right to the byte, the loss covers what it should, and the real rows render and count right."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dora_core.data.collate import IGNORED
from dora_core.data.rows import DataError, read_rows, require_fields
from dora_core.registry import DATASETS
from pipelines.llm import data
from pipelines.llm.config import COMMONSENSE, DataSection

REPOSITORY = Path(__file__).resolve().parents[3]
REAL = Path(os.environ.get("DORA_COMMONSENSE", REPOSITORY.parent / "shared" / "data" / "commonsense"))
ROW = {"instruction": "Say {hi}\nto Bob", "input": "", "output": "the correct answer is true"}
WITH_INPUT = ROW | {"input": "Bob is 7"}
SPECIAL = ["<unk>", "<s>", "</s>"]


def row(number, output="the correct answer is true"):
    return {"instruction": f"Is {number} even?", "input": "", "output": output}


def section(**fields):
    return DataSection(train=fields.pop("train", ["unused"]), **fields)


def build(kind, add_eos=False):
    """Train a tokenizer whose answer's first token begins in the prompt (metaspace) or does not (bytes)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, ignore_merges=kind == "ignore_merges"))
    alphabet = []
    if kind == "metaspace":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [data.render_prompt(row(n), "alpaca") + row(n)["output"] + f" é{n}" for n in range(50)]
    words = [" the correct answer is true", "▁the▁correct", "Say hi to Bob", "solution1/solution2"] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(words if kind == "metaspace" else texts + words, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A" + " </s>" * add_eos, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["bytes", "ignore_merges", "metaspace"])
def any_tokenizer(request):
    return build(request.param)


@pytest.fixture(scope="module")
def tokenizer():
    return build("bytes")


def test_the_reference_template_is_right_to_the_byte():
    s = " " * 16
    opening = (
        b"Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    assert data.render_prompt(ROW, "alpaca_reference").encode() == (
        opening + f"  \n\n{s}### Instruction:\n{s}Say {{hi}}\nto Bob\n{s}\n{s}### Response:\n{s}".encode()
    )
    assert data.render_prompt(ROW, "alpaca_reference", for_evaluation=True).encode() == (
        opening + f" \n\n{s}### Instruction:\n{s}Say {{hi}}\nto Bob\n\n{s}### Response:\n{s}".encode()
    )


def test_the_reference_template_with_input_is_right_to_the_byte():
    s = " " * 16
    opening = (
        b"Below is an instruction that describes a task, paired with an input that provides further context. "
        b"Write a response that appropriately completes the request."
    )
    assert data.render_prompt(WITH_INPUT, "alpaca_reference").encode() == (
        opening
        + f" \n\n{s}### Instruction:\n{s}Say {{hi}}\nto Bob\n{s}\n{s}### Input:\n{s}Bob is 7\n{s}\n".encode()
        + f"{s}### Response:\n{s}".encode()
    )
    assert data.render_prompt(WITH_INPUT, "alpaca_reference", for_evaluation=True).encode() == (
        opening
        + f"\n\n{s}### Instruction:\n{s}Say {{hi}}\nto Bob\n\n{s}### Input:\n{s}Bob is 7\n\n".encode()
        + f"{s}### Response:\n{s}".encode()
    )


@pytest.mark.parametrize("for_evaluation", [False, True])
def test_the_clean_templates_are_right_to_the_byte(for_evaluation):
    assert data.render_prompt(ROW, "alpaca", for_evaluation) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay {hi}\nto Bob\n\n### Response:\n"
    )
    assert data.render_prompt(WITH_INPUT, "alpaca", for_evaluation) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSay {hi}\nto Bob\n\n### Input:\n"
        "Bob is 7\n\n### Response:\n"
    )
    assert data.render_prompt(ROW, "plain", for_evaluation) == ""
    with pytest.raises(ValueError, match="Did you mean alpaca"):
        data.render_prompt(ROW, "alpaka")


@pytest.mark.parametrize("template", ["alpaca", "alpaca_reference", "plain"])
@pytest.mark.parametrize("output", ["the correct answer is true", " \n spaced", "é\u2028✓"])
def test_the_loss_covers_the_answer_found_in_the_text_and_the_end(any_tokenizer, template, output):
    given = row(4, output)
    encoded = data.encode_row(given, any_tokenizer, section(template=template, train_on_inputs=False, cutoff_len=4000))
    text = "".join(data.render(given, template))
    reference = any_tokenizer(text, return_offsets_mapping=True)
    assert encoded.input_ids == [*reference["input_ids"], any_tokenizer.eos_token_id]
    answer_start = len(text) - len(output)
    covered = set()
    for label, (start, stop) in zip(encoded.labels, reference["offset_mapping"], strict=False):
        if label != IGNORED:
            covered |= set(range(start, stop))
        else:
            assert stop <= answer_start
    assert covered >= set(range(answer_start, len(text)))
    first = next(i for i, label in enumerate(encoded.labels) if label != IGNORED)
    assert reference["offset_mapping"][first][0] <= answer_start < reference["offset_mapping"][first][1]
    assert encoded.labels[first:] == encoded.input_ids[first:]
    assert encoded.labels[-1] == any_tokenizer.eos_token_id


def test_a_token_that_spans_prompt_and_answer_carries_loss():
    tokenizer = build("metaspace")
    encoded = data.encode_row(
        row(4), tokenizer, section(template="alpaca_reference", train_on_inputs=False, cutoff_len=512)
    )
    first = next(label for label in encoded.labels if label != IGNORED)
    assert re.match("▁+the", tokenizer.convert_ids_to_tokens(first))


def test_with_train_on_inputs_every_token_is_labelled(any_tokenizer):
    encoded = data.encode_row(ROW, any_tokenizer, section(cutoff_len=4000))
    assert encoded.labels == encoded.input_ids
    assert encoded.input_ids[0] == any_tokenizer.bos_token_id and encoded.input_ids[-1] == any_tokenizer.eos_token_id


@pytest.mark.parametrize("add_eos", [False, True])
def test_the_end_token_is_added_once_and_only_where_it_fits(add_eos):
    tokenizer = build("bytes", add_eos)
    whole = data.encode_row(row(4), tokenizer, section(cutoff_len=4000)).input_ids
    assert whole.count(2) == 1 and whole[-1] == 2
    exact = section(cutoff_len=len(whole) - 1)
    rows, counts = data.encode_rows([row(4)], tokenizer, exact)
    assert rows[0].input_ids == whole[:-1]
    assert (counts["num_truncated"], counts["num_without_eos"]) == (0, 1)


def test_a_row_that_is_too_long_is_an_error_that_names_it(tokenizer):
    rows = [row(1), row(2), row(3, "the correct answer is true " * 40), row(4, "the correct " * 90)]
    length = len(tokenizer("".join(data.render(rows[2], "alpaca")))["input_ids"])
    with pytest.raises(DataError) as error:
        data.encode_rows(rows, tokenizer, section(cutoff_len=120), "rows.json")
    assert f"Row 3 of rows.json has {length} tokens; at most data.cutoff_len (120)" in str(error.value)
    assert "2 of 4 rows" in str(error.value)
    assert "Raise data.cutoff_len or set data.overlong: truncate" in str(error.value)


def test_truncated_rows_are_counted_with_those_that_lose_their_answer(tokenizer):
    rows = [row(1), row(2, "the correct answer is true " * 40), row(10**60)]
    whole = data.encode_row(rows[0], tokenizer, section(cutoff_len=4000)).input_ids
    limit = section(cutoff_len=len(whole), overlong="truncate", train_on_inputs=False)
    encoded, counts = data.encode_rows(rows, tokenizer, limit)
    assert [len(one.input_ids) for one in encoded] == [len(whole)] * 3
    assert encoded[0].input_ids == whole
    assert counts == {
        "num_truncated": 2,
        "num_truncated_answers": 1,
        "num_without_eos": 2,
        "num_untrainable": 1,
    }


def test_rows_of_other_lengths_in_one_call_are_encoded_as_alone(any_tokenizer):
    rows = [row(n, "true " * (n % 5 + 1)) for n in range(30)]
    limit = section(cutoff_len=4000, train_on_inputs=False)
    together, _ = data.encode_rows(rows, any_tokenizer, limit)
    assert together == [data.encode_row(one, any_tokenizer, limit) for one in rows]


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer):
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, unk_token="<unk>")
    with pytest.raises(ValueError, match=r"Set model\.tokenizer"):
        data.encode_row(ROW, without, section())


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def test_training_data_is_split_by_seed_and_reported(tmp_path, tokenizer):
    paths = [write(tmp_path / "a.json", [row(n) for n in range(30)]), write(tmp_path / "b.json", [row(99)])]
    limit = section(train=paths, num_validation=5, train_on_inputs=False)
    rows, validation, report = data.load_training_data(limit, tokenizer, seed=1)
    assert (len(rows), len(validation)) == (report.num_rows, report.num_validation) == (26, 5)
    assert report.num_tokens == sum(len(one.input_ids) for one in rows)
    assert report.num_target_tokens == sum(label != IGNORED for one in rows for label in one.labels)
    assert report.num_truncated == report.num_without_eos == report.num_untrainable == 0
    assert "26 training rows" in str(report) and report.dataset_hash[:12] in str(report)
    assert data.load_training_data(limit, tokenizer, seed=1) == (rows, validation, report)
    other_rows, _, other = data.load_training_data(limit, tokenizer, seed=2)
    assert other.dataset_hash == report.dataset_hash and other_rows != rows
    everything, _ = data.encode_rows([row(n) for n in [*range(30), 99]], tokenizer, limit)
    assert sorted(one.input_ids for one in rows + validation) == sorted(one.input_ids for one in everything)


def test_validation_rows_may_be_given(tmp_path, tokenizer):
    train = write(tmp_path / "a.json", [row(n) for n in range(4)])
    held = write(tmp_path / "b.json", [row(n) for n in range(7)])
    rows, validation, report = data.load_training_data(section(train=[train], validation=[held]), tokenizer, seed=0)
    assert (len(rows), len(validation), report.num_validation) == (4, 7, 7)
    changed = write(tmp_path / "b.json", [row(n, "false") for n in range(7)])
    _, _, other = data.load_training_data(section(train=[train], validation=[changed]), tokenizer, seed=0)
    assert other.dataset_hash != report.dataset_hash


def test_holding_out_every_row_is_an_error(tmp_path, tokenizer):
    path = write(tmp_path / "a.json", [row(n) for n in range(4)])
    with pytest.raises(DataError, match=r"data\.num_validation is 120 and there are 4 rows"):
        data.load_training_data(section(train=[path]), tokenizer, seed=0)


def test_many_rows_with_nothing_to_train_on_are_an_error_and_few_are_counted(tmp_path, tokenizer):
    length = len(data.encode_row(row(100), tokenizer, section(cutoff_len=4000)).input_ids)
    limit = {"cutoff_len": length + 4, "overlong": "truncate", "train_on_inputs": False, "num_validation": 0}
    path = write(tmp_path / "a.json", [row(100)] * 198 + [row(10**90)] * 2)
    _, _, report = data.load_training_data(section(train=[path], **limit), tokenizer, seed=0)
    assert report.num_untrainable == report.num_truncated_answers == 2 and report.num_rows == 200
    path = write(tmp_path / "a.json", [row(100)] * 97 + [row(10**90)] * 3)
    with pytest.raises(DataError, match="3 of 100 rows have no token to train on; at most 1% may"):
        data.load_training_data(section(train=[path], **limit), tokenizer, seed=0)


def test_plain_rows_need_an_output_only_and_others_an_instruction(tmp_path, tokenizer):
    path = write(tmp_path / "a.json", [{"output": "some text"}] * 3)
    rows, _, _ = data.load_training_data(section(train=[path], template="plain", num_validation=0), tokenizer, seed=0)
    assert tokenizer.decode(rows[0].input_ids, skip_special_tokens=True) == "some text"
    with pytest.raises(DataError, match=r"a\.json, line 1: the row has the fields \['output'\]; it must have 'instr"):
        data.load_training_data(section(train=[path]), tokenizer, seed=0)


def test_the_registered_mix_prefers_one_file_and_wants_every_task(tmp_path):
    assert DATASETS.get("llm/commonsense") is data.commonsense
    with pytest.raises(DataError, match=r"commonsense_170k\.json nor .*piqa"):
        data.commonsense(str(tmp_path))
    for number, task in enumerate(COMMONSENSE):
        folder = tmp_path / data.TASK_FOLDERS[task]
        folder.mkdir()
        write(folder / "train.json", [row(number)])
    assert data.commonsense(str(tmp_path)) == [row(number) for number in range(8)]
    write(tmp_path / "commonsense_170k.json", [row(77)])
    assert data.commonsense(str(tmp_path)) == [row(77)]


def test_a_registered_name_can_be_trained_on(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "data" / "commonsense").mkdir(parents=True)
    write(tmp_path / "data" / "commonsense" / "commonsense_170k.json", [row(n) for n in range(6)])
    monkeypatch.chdir(tmp_path)
    rows, _, _ = data.load_training_data(section(train=["llm/commonsense"], num_validation=2), tokenizer, seed=0)
    assert len(rows) == 4
    with pytest.raises(ValueError, match="Did you mean llm/commonsense"):
        data.load_training_data(section(train=["llm/comonsense"]), tokenizer, seed=0)


def test_task_templates_cover_every_task_and_check_their_fields():
    assert set(data.TASK_TEMPLATES) == set(COMMONSENSE)
    assert data.task_instruction("hellaswag", activity="Cooking", context="A man", options=["a", "b", "c", "d"]) == (
        "Please choose the correct ending to complete the given sentence: Cooking: A man\n\n"
        "Ending1: a Ending2: b Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4"
    )
    with pytest.raises(ValueError, match=r"it takes the fields \['goal', 'options'\]"):
        data.task_instruction("piqa", question="x", options=["a"])
    with pytest.raises(ValueError, match="Did you mean boolq"):
        data.task_instruction("bool", question="x")


FILES = {  # rows and labels of each file, from the data set's own description
    "boolq/train": (9427, None),
    "ARC-Easy/train": (2251, None),
    "ARC-Challenge/train": (1119, None),
    "openbookqa/train": (4957, None),
    "boolq/test": (3270, [2033, 1237]),
    "piqa/test": (1838, [910, 928]),
    "social_i_qa/test": (1954, [643, 654, 657]),
    "winogrande/test": (1267, [628, 639]),
    "ARC-Easy/test": (2376, [596, 585, 633, 561, 1]),
    "ARC-Challenge/test": (1172, [266, 311, 310, 285]),
    "openbookqa/test": (500, [138, 126, 132, 104]),
}
PATTERNS = {  # what a raw benchmark row has, read back from the rendered instruction
    "boolq": r"question: (?P<question>.*)\?\n\nAnswer format: true/false$",
    "piqa": r"question: (?P<goal>.*?)\n\n(?=Solution1: )",
    "winogrande": r"sentence: (?P<sentence>.*?)\n\n(?=Option1: )",
    "other": r"question: (?P<question>.*?)\n\n(?=Answer1: )",
}


def read_back(task, instruction):
    match = re.search(PATTERNS.get(task, PATTERNS["other"]), instruction, re.DOTALL)
    fields = match.groupdict()
    if task == "social_i_qa":
        fields["context"], fields["question"] = fields["question"].rsplit(" ", 1)
    if task != "boolq":
        shown = instruction[match.end() : instruction.rindex("Answer format: ")].removesuffix(" ").removesuffix("\n\n")
        word = data.TASK_TEMPLATES[task][1]
        fields["options"] = re.split(rf"(?:^|\n\n| ){word}\d: ", shown)[1:]
    return fields


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no commonsense rows at {REAL}; set DORA_COMMONSENSE to their folder")
@pytest.mark.parametrize("name", FILES)
def test_real_rows_load_render_and_count_right(name):
    folder, kind = name.split("/")
    source = REAL / folder / f"{kind}.json"
    if not source.is_file():
        pytest.skip(f"{source} is absent")
    rows = read_rows(str(source))
    num_rows, labels = FILES[name]
    assert len(rows) == num_rows
    require_fields(rows, ["instruction", "input", "output", "answer"], str(source))
    counted = Counter(one["answer"] for one in rows)
    if labels:
        order = sorted(counted, key=lambda label: (label != "true", label))
        assert [counted[label] for label in order] == labels
    task = next(task for task, held in data.TASK_FOLDERS.items() if held == folder)
    for one in rows:
        assert one["output"] == "the correct answer is " + one["answer"]
        prompt, answer = data.render(one, "alpaca_reference")
        assert one["instruction"] in prompt and prompt.endswith("### Response:\n" + " " * 16)
        assert answer == one["output"]
        assert data.task_instruction(task, **read_back(task, one["instruction"])) == one["instruction"]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no commonsense rows at {REAL}; set DORA_COMMONSENSE to their folder")
def test_real_rows_become_training_data(tokenizer):
    source = str(REAL / "ARC-Challenge" / "train.json")
    limit = section(
        train=[source], template="alpaca_reference", overlong="truncate", train_on_inputs=False, cutoff_len=700
    )
    rows, validation, report = data.load_training_data(limit, tokenizer, seed=42)
    assert (report.num_rows, report.num_validation) == (999, 120)
    assert report.num_truncated <= report.num_without_eos
    for one in (rows + validation)[:200]:
        kept = [label for label in one.labels if label != IGNORED]
        if len(one.input_ids) < 700:
            text = tokenizer.decode(kept, skip_special_tokens=True)
            assert re.fullmatch(r"\s*the correct answer is answer[1-5]", text)
