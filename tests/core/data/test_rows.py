"""Rows come back complete and in order, and a mistake is named with its file and line."""

from __future__ import annotations

import json

import pytest

from dora_core.data.rows import DataError, hold_out, read_rows, require_fields


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return str(path)


ROWS = [{"output": "a"}, {"output": "b\u2028c"}, {"output": "ü"}]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("form", ["list.json", "pretty.json", "lines.jsonl", "lines.json"])
def test_every_form_of_file_gives_the_same_rows(tmp_path, form, encoding, newline):
    if form.startswith("lines"):
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
    else:
        text = json.dumps(ROWS, ensure_ascii=False, indent=2 if form == "pretty.json" else None) + "\n"
    assert read_rows(write(tmp_path / form, text.replace("\n", newline), encoding)) == ROWS


@pytest.mark.parametrize(
    ("name", "text", "line", "reason"),
    [
        ("a.jsonl", '{"a": "1"}\n\n{"a": \n', 3, "not JSON"),
        ("a.jsonl", '{"a": "1"}\r\n[1]\r\n', 2, "found a list"),
        ("a.json", '{"a": "1"}\n"text"\n', 2, "found a str"),
        ("a.json", '[\n {"a": "1"},\n {"a" "2"}\n]', 3, "not JSON"),
        ("a.json", '[\n {"a": "1"},\n 7\n]', 3, "found a int"),
        ("a.json", '[\n {"a": "1"}\n {"a": "2"}\n]', 3, "expected ',' or ']'"),
        ("a.json", '[\n {"a": "1"},\n', 3, "not JSON"),
        ("a.json", '[\n {"a": "1"}\n', 3, "the end of the file"),
        ("a.json", '[\n {"a": "1"}\n]\n}', 4, "nothing after the list"),
        ("a.json", '{\n "data": []\n}', 1, "not JSON"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path, name, text, line, reason):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert f"{path}, line {line}: " in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize("text", ["", "  \n", "[]", "\ufeff[ \r\n ]"])
def test_an_empty_file_is_an_error(tmp_path, text):
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(write(tmp_path / "a.json", text))


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": "b"}\n{"a": "ü"}\n', "latin-1")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_rows(path)


def test_a_source_that_does_not_exist_is_an_error_that_says_what_is_allowed(tmp_path):
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_rows(str(tmp_path / "absent.json"))


def test_a_folder_is_read_in_the_order_of_its_file_names(tmp_path):
    write(tmp_path / "b.json", '[{"n": "2"}]')
    write(tmp_path / "a.jsonl", '{"n": "1"}')
    write(tmp_path / "notes.txt", "not rows")
    assert read_rows(str(tmp_path)) == [{"n": "1"}, {"n": "2"}]


def test_a_folder_of_tasks_gives_each_tasks_training_rows(tmp_path):
    for task, number in (("boolq", "1"), ("piqa", "2")):
        write(tmp_path / task / "train.json", json.dumps([{"n": number}]))
        write(tmp_path / task / "test.json", '[{"n": "test"}]')
    assert read_rows(str(tmp_path)) == [{"n": "1"}, {"n": "2"}]


@pytest.mark.parametrize("names", [("train.json", "test.json"), ("all.json", "boolq/train.json")])
def test_a_folder_that_may_mix_in_other_rows_is_refused(tmp_path, names):
    for name in names:
        write(tmp_path / name, '[{"n": "1"}]')
    with pytest.raises(DataError, match="Name the files themselves"):
        read_rows(str(tmp_path))


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize(
    ("row", "reason"),
    [('{"output": 3}', "output is 3; it must be a string"), ('{"other": "x"}', "it must have 'output'")],
)
@pytest.mark.parametrize("as_list", [True, False])
def test_a_bad_field_is_named_with_file_and_line_across_files(tmp_path, row, reason, as_list):
    write(tmp_path / "a.json", '[{"output": "x"},\n{"output": "y"}]')
    text = f'[\n{{"output": "z"}},\n{row}]' if as_list else f'{{"output": "z"}}\n\n{row}\n'
    path = write(tmp_path / "b.json", text)
    rows = read_rows(str(tmp_path))
    with pytest.raises(DataError) as error:
        require_fields(rows, ["output"], str(tmp_path))
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert reason in str(error.value)


def test_an_optional_field_may_be_absent_but_not_of_another_type():
    require_fields([{"output": "x"}], ["output"], "rows", optional=["input"])
    with pytest.raises(DataError, match="rows, row 2: input is null"):
        require_fields([{"output": "x"}, {"output": "x", "input": None}], ["output"], "rows", optional=["input"])


def test_a_hub_data_set_is_loaded_by_name_and_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    write(folder / "train.jsonl", '{"n": "1"}\n{"n": "2"}\n')
    write(folder / "test.jsonl", '{"n": "3"}\n')
    assert read_rows(f"hf:{folder}") == [{"n": "1"}, {"n": "2"}]
    assert read_rows(f"hf:{folder}:test") == [{"n": "3"}]
    with pytest.raises(DataError, match="Check the name and the split"):
        read_rows(f"hf:{folder}:validation")


def test_a_hub_data_set_out_of_reach_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hf:nobody/nothing could not be loaded .* give a JSON file"):
        read_rows("hf:nobody/nothing")


def test_held_out_rows_are_chosen_by_seed_and_leave_the_rest_in_order():
    rows = list(range(50))
    kept, held = hold_out(rows, 7, seed=3)
    assert len(held) == 7 and sorted(kept + held) == rows
    assert kept == sorted(kept)
    assert hold_out(rows, 7, seed=3) == (kept, held)
    assert hold_out(rows, 7, seed=4)[1] != held
    assert hold_out(rows, 0, seed=3) == (rows, [])
    with pytest.raises(DataError, match="at least one must be left"):
        hold_out(rows, 50, seed=3)
