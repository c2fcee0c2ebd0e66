from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dora_core.cli import main
from dora_core.config import TrainSection, load_config, section
from dora_core.registry import EVALUATORS, PIPELINES
from dora_core.testing.tiny import save_tiny_llama

CHECKOUT = Path(__file__).parents[2]
ROWS = [
    {"instruction": f"Is {number} even?", "input": "", "output": f"It is {number % 2 == 0}.", "answer": "true"}
    for number in range(40)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder, [row["output"] for row in ROWS], 300, hidden=16, layers=1, heads=2)
    return folder


@pytest.fixture
def recipe(tmp_path, model, monkeypatch) -> Path:
    """A complete recipe on a tiny model; the working directory holds its rows."""
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(json.dumps(ROWS))
    Path("recipe.yaml").write_text(
        f"model: {{path: {model}}}\n"
        "data: {train: [rows.json], num_validation: 4, cutoff_len: 400}\n"
        "adapter: {rank: 2, alpha: 4}\n"
        "train: {lr: 1e-3, global_batch_size: 4, micro_batch_size: 2, max_steps: 2, precision: fp32, "
        "gradient_checkpointing: false}\n"
        "deepspeed: {config: zero0}\n"
        "log: {tensorboard: false, progress: false}\n"
        "evaluate: {path: ., tasks: [boolq], num_beams: 1, max_new_tokens: 4}\n"
    )
    return tmp_path / "recipe.yaml"


@pytest.fixture(autouse=True)
def leave_no_process_group():
    """Each case joins its own group of one rank, as each command does."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def fails(capsys):
    """Run a command that must end as a user's mistake ends; return its message."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        err = capsys.readouterr().err
        assert caught.value.code == 2
        assert err.count("error: ") == 1 and "Traceback" not in err
        message = err[err.index("error: ") :].strip()
        assert "\n" not in message
        return message.removeprefix("error: ")

    return run


# list and show


def test_list_names_pipelines_recipes_and_evaluators_without_importing_what_is_slow():
    script = (
        "import sys; from dora_core.cli import main; main(['list']); "
        "slow = {'torch', 'transformers', 'pydantic', 'deepspeed', 'numpy', 'datasets', 'ruamel.yaml'}; "
        "print('imported:', sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported: []\n")
    for name in PIPELINES.names():
        assert f"{name}  (" in done.stdout
        for evaluator in EVALUATORS.names(name):
            assert evaluator in done.stdout
        for path in PIPELINES.get(name).recipes.glob("*.yaml"):
            assert path.stem in done.stdout


def test_show_prints_a_recipe_that_reloads_with_the_overrides_in_it(capsys, tmp_path):
    llm = PIPELINES.get("llm")
    overrides = ["--train.lr", "2e-4", "--run.name", "7", "--adapter.targets", r".*\.(q|v)_proj"]
    main(["show", "llama_7b_dora_r32", *overrides])
    text = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(text)
    shown = load_config(llm.config, tmp_path / "shown.yaml", recipes=llm.recipes)
    assert shown == load_config(llm.config, "llama_7b_dora_r32", overrides, recipes=llm.recipes)
    assert (shown.train.lr, shown.run.name) == (2e-4, "7")
    main(["show", "llm", "llama_7b_dora_r32", *overrides])
    assert capsys.readouterr().out == text


def test_show_takes_the_path_of_a_recipe(capsys, recipe, fails):
    main(["show", "llm", str(recipe), "--adapter.rank", "5"])
    assert "rank: 5" in capsys.readouterr().out
    assert "Say which: dora show llm" in fails("show", str(recipe))


@pytest.fixture
def second_pipeline(monkeypatch, tmp_path):
    """A pipeline beside ``llm`` with a recipe of the same name; both only note that their demo was asked for."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.yaml").write_text("train: {lr: 0.125}\n")
    ran = []

    @section
    class Config:
        train: TrainSection

    def pipeline(name: str, config: type, recipes: Path) -> SimpleNamespace:
        return SimpleNamespace(config=config, recipes=recipes, demo=lambda arguments: ran.append((name, arguments)))

    llm = PIPELINES.get("llm")
    both = {
        "llm": pipeline("llm", llm.config, llm.recipes),
        "second": pipeline("second", Config, tmp_path / "recipes"),
    }
    monkeypatch.setattr(PIPELINES, "_objects", both)
    monkeypatch.setattr("dora_core.registry.pipeline_packages", lambda: {"llm": "pipelines.llm"})
    return ran


def test_a_recipe_name_that_two_pipelines_have_must_be_told_apart(second_pipeline, fails, capsys, tmp_path):
    message = fails("show", "tiny")
    assert message == "Recipe 'tiny' can be of llm or second. Say which: dora show llm tiny."
    main(["show", "second", "tiny"])
    assert "lr: 0.125" in capsys.readouterr().out
    main(["show", str(tmp_path / "recipes" / "tiny.yaml")])
    assert "lr: 0.125" in capsys.readouterr().out


def test_the_demo_of_all_is_that_of_each(second_pipeline):
    main(["demo", "all"])
    assert second_pipeline == [("llm", []), ("second", [])]
    main(["demo", "second", "--output", "there"])
    assert second_pipeline[2:] == [("second", ["--output", "there"])]


def test_the_demo_of_all_names_the_pipelines_that_have_none(second_pipeline, capsys):
    del PIPELINES.get("second").demo
    main(["demo", "all"])
    assert second_pipeline == [("llm", [])]
    assert capsys.readouterr().out == "without a demo: second\n"


def test_a_verb_that_a_pipeline_lacks_is_refused(second_pipeline, fails):
    assert fails("merge", "second") == (
        "Pipeline 'second' has no merge. Add it to its pipeline.py, or use another verb."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show"], "dora show needs a recipe"),
        (["show", "--train.lr", "1"], "dora show needs a recipe"),
        (["show", "tinny"], "Unknown recipe 'tinny'. Did you mean tiny"),
        (["show", "llm", "tinny"], "Unknown recipe 'tinny'. Did you mean tiny"),
        (["show", "llm", "tiny", "--train.learning_rate", "1"], "Unknown key 'train.learning_rate'"),
        (["list", "llm"], "dora list takes no arguments; it was given llm"),
        (["train"], "dora train needs a pipeline first: one of llm"),
        (["train", "--config", "tiny"], "dora train needs a pipeline first"),
        (["train", "lm", "--config", "tiny"], "Unknown pipeline 'lm'. Did you mean vlm or llm?"),
        (["demo", "all", "--output", "x"], "dora demo all takes no further arguments"),
    ],
)
def test_a_command_of_the_wrong_form_ends_in_one_message(fails, arguments, message):
    assert message in fails(*arguments)


def test_an_unknown_verb_lists_the_verbs(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["trian"])
    assert caught.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_a_traceback_is_shown_to_those_who_ask_for_it(recipe, monkeypatch):
    monkeypatch.setenv("DORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"adapter\.rank is 0"):
        main(["train", "llm", "--config", str(recipe), "--adapter.rank", "0"])


# train


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--adapter.rank", "0"],
            "adapter.rank is 0; it must be a positive integer. Set for example adapter.rank: 32.",
        ),
        (["--adapter.rnk", "1"], "Unknown key 'adapter.rnk'. Did you mean adapter.rank"),
        (["--model.path", "no/such/model"], "The tokenizer 'no/such/model' (name, and no folder of that path exists)"),
        (["--data.train", "[no_such.json]"], "no_such.json is neither a file nor a folder here"),
        (["--data.train", "[llm/comonsense]"], "Unknown dataset 'llm/comonsense'. Did you mean llm/commonsense"),
        (["--adapter.targets", "[qproj]"], "q_proj"),
        (["--adapter.targets", "[]"], "adapter.targets is []; it must be non-empty"),
        (["--data.cutoff_len", "16"], "Raise data.cutoff_len or set data.overlong: truncate."),
        (["--train.micro_batch_size", "3"], "does not divide into micro-batches of 3 rows on 1 ranks. Use train.micro"),
        (["--deepspeed.config", "zero9"], "Unknown DeepSpeed configuration 'zero9'. Did you mean zero"),
        (["--data.num_validation", "40"], "data.num_validation is 40 and there are 40 rows"),
        (["--run.resume", "must"], "holds no checkpoint that verifies. Set run.resume: never"),
    ],
)
def test_a_users_mistake_ends_training_in_one_message(fails, recipe, overrides, message):
    assert message in fails("train", "llm", "--config", str(recipe), *overrides)


def test_an_unknown_recipe_ends_in_one_message(fails):
    assert "Unknown recipe 'tinyy'. Did you mean tiny" in fails("train", "llm", "--config", "tinyy")


def test_training_without_a_recipe_says_what_is_missing(capsys):
    with pytest.raises(SystemExit):
        main(["train", "llm"])
    err = capsys.readouterr().err
    for name in ("model", "data", "train"):
        assert f"{name} is required and has no default" in err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "rows.jsonl",
            '{"instruction": "a", "output": "b"}\n\n{"instruction": "a" "output"}\n',
            "rows.jsonl, line 3: not",
        ),
        ("rows.json", '[\n{"instruction": "a", "output": "b"},\n{"instruction": }\n]\n', "rows.json, line 3: not JSON"),
        (
            "rows.jsonl",
            '{"instruction": "a", "output": "b"}\n{"output": "b"}\n',
            "rows.jsonl, line 2: the row has the f",
        ),
        (
            "rows.jsonl",
            '{"instruction": "a", "output": "b"}\n{"instruction": 3, "output": "b"}\n',
            "rows.jsonl, line 2: i",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(fails, recipe, name, text, message):
    Path("bad").mkdir()
    (Path("bad") / name).write_text(text)
    assert message in fails("train", "llm", "--config", str(recipe), "--data.train", f"[bad/{name}]")


def test_a_tokenizer_without_a_token_to_pad_with_is_refused(fails, recipe):
    backend = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1, "b": 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained("tokenizer")
    message = fails("train", "llm", "--config", str(recipe), "--model.tokenizer", "tokenizer")
    assert "The tokenizer of 'tokenizer' has no pad token" in message
    assert "give its folder as model.tokenizer" in message


def test_a_folder_that_is_no_model_is_refused(fails, recipe):
    Path("empty").mkdir()
    assert "'empty' (folder) cannot be loaded" in fails(
        "train", "llm", "--config", str(recipe), "--model.path", "empty"
    )


def test_a_run_folder_that_holds_checkpoints_is_not_overwritten(fails, recipe):
    kept = Path("runs/run/checkpoints/step-00000007")
    kept.mkdir(parents=True)
    message = fails("train", "llm", "--config", str(recipe))
    assert "runs/run already holds checkpoints (last step 7). Set run.resume: auto" in message
    assert kept.is_dir()


def test_a_run_folder_that_cannot_be_made_is_named(fails, recipe):
    assert "rows.json" in fails("train", "llm", "--config", str(recipe), "--run.root", "rows.json")


# evaluate and merge


def test_an_unknown_evaluator_ends_in_one_message(fails, recipe):
    message = fails("evaluate", "llm", "--config", str(recipe), "--evaluate.tasks", "[bolq]")
    assert "bolq" in message and "Did you mean" in message and "boolq" in message


def test_missing_test_rows_are_named_with_where_they_must_be(fails, recipe):
    assert "boolq/test.json" in fails("evaluate", "llm", "--config", str(recipe))


def test_an_adapter_that_is_not_there_is_named(fails, recipe, model):
    evaluate = fails("evaluate", "llm", "--config", str(recipe), "--adapter", "no/adapter")
    merge = fails("merge", "llm", "--base", str(model), "--adapter", "no/adapter", "--output", "merged")
    assert "no/adapter" in evaluate and "no/adapter" in merge


# As a process


def test_a_mistake_ends_the_process_with_status_2_and_one_line():
    command = [sys.executable, "-m", "dora_core.cli", "train", "llm", "--config", "tiny", "--adapter.dropout", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(errors) == 1 and "adapter.dropout is 1.0; it must be at least 0 and below 1." in errors[0]


def test_the_training_script_ends_likewise_from_any_folder(tmp_path):
    script = str(CHECKOUT / "pipelines" / "llm" / "train.py")
    command = [sys.executable, script, "--local_rank=0", "--config", "tiny", "--data.train", "[missing.json]"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command += ["--model.path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(errors) == 1 and f"The tokenizer {str(tmp_path)!r} (folder) cannot be loaded" in errors[0]


def test_help_on_training_says_how_to_name_recipes_and_fields(capsys):
    main(["train", "llm", "--help"])
    printed = capsys.readouterr().out
    assert "--config RECIPE [--section.field value]" in printed
    assert "llama_7b_dora_r32" in printed
    assert "dora show RECIPE" in printed
