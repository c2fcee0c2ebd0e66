"""A whole sweep through the command line on a tiny model: stopped, gone on with, with a run that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dora_core.cli import main
from dora_core.testing.tiny import save_tiny_llama
from dora_core.training.checkpoint import CheckpointStore
from dora_core.training.folder import lock_folder
from dora_core.training.metrics import read_metrics

NUM_STEPS = 150
ROWS = [
    {
        "instruction": f"Is {number} even? Answer format: true/false",
        "input": "",
        "output": f"the correct answer is {str(number % 2 == 0).lower()}",
        "answer": str(number % 2 == 0).lower(),
    }
    for number in range(24)
]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> str:
    """A recipe on a tiny model; the working directory holds it, its rows and, later, the sweep."""
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "model", [row["output"] for row in ROWS], 300, hidden=16, layers=1, heads=2)
    Path("boolq").mkdir()
    Path("boolq/test.json").write_text(json.dumps(ROWS[:6]))
    Path("rows.json").write_text(json.dumps(ROWS))
    Path("small.yaml").write_text(
        "model: {path: model}\n"
        "data: {train: [rows.json], num_validation: 0, cutoff_len: 400}\n"
        "adapter: {rank: 2, alpha: 4}\n"
        f"train: {{lr: 1e-3, global_batch_size: 2, micro_batch_size: 2, max_steps: {NUM_STEPS}, precision: fp32, "
        "gradient_checkpointing: false, log_every: 1}\n"
        "deepspeed: {config: zero0}\n"
        "log: {tensorboard: false}\n"
        "evaluate: {path: ., tasks: [boolq], num_beams: 1, max_new_tokens: 2}\n"
    )
    return "small.yaml"


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def has_steps(path: Path, count: int) -> bool:
    return path.is_file() and len(read_metrics(path)) >= count


def processes_here() -> list[str]:
    """Return the training processes of this working directory."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "cwd") == os.getcwd() and folder.name != str(os.getpid()):
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return [command for command in found if "train.py" in command]


@pytest.mark.usefixtures("signals_of_a_terminal")
def test_a_sweep_is_stopped_goes_on_and_survives_a_run_that_fails(recipe, capsys):
    output = Path("runs/sweep/small")
    words = [sys.executable, "-m", "dora_core.cli", "sweep", "llm", recipe, "--adapter.kind", "lora,dora"]
    with Path("said").open("w") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said)
        deadline = time.monotonic() + 120
        while not has_steps(output / "dora" / "metrics.jsonl", 3):
            assert process.poll() is None and time.monotonic() < deadline, Path("said").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75
    assert "Stopped. The same command goes on" in Path("said").read_text()
    assert "Traceback" not in Path("said").read_text()
    assert not processes_here()
    step = CheckpointStore(output / "dora" / "checkpoints").newest()
    assert 3 <= step < NUM_STEPS
    document = json.loads((output / "sweep.json").read_text())
    assert [run["status"] for run in document["runs"]] == ["finished", "stopped"]
    finished = state_of(output / "lora")

    with pytest.raises(SystemExit) as caught:
        main(["sweep", "llm", recipe, "--adapter.kind", "lora,none,dora"])  # none trains nothing, which is an error
    said = capsys.readouterr().out
    assert caught.value.code == 1
    assert said.startswith(f"3 runs in {output}: 3 adapter.kind. 1 are finished.\n[1/2] none\n")
    assert f"failed, exit status 2; its log is {output / 'none.log'}\n      error: " in said
    assert "Not finished: none (failed with status 2" in said
    assert state_of(output / "lora") == finished
    assert f"resumed from {output / 'dora' / 'checkpoints'}/step-{step:08d}" in (output / "dora.log").read_text()
    rows = [row["step"] for row in read_metrics(output / "dora" / "metrics.jsonl") if "loss" in row]
    assert rows == list(range(1, NUM_STEPS + 1))

    document = json.loads((output / "sweep.json").read_text())
    assert [(run["name"], run["status"]) for run in document["runs"]] == [
        ("lora", "finished"),
        ("none", "failed"),
        ("dora", "finished"),
    ]
    assert document["runs"][0]["environment"]["versions"]["torch"] and document["commit"]
    (difference,) = document["differences"]
    assert (difference["of"], difference["minus"]) == ("dora", "lora")
    assert difference["interval"] == "normal, over 6 questions; one seed"
    assert (output / "table.md").read_text().rstrip("\n") in said
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")

    main(["sweep", "llm", recipe, "--adapter.kind", "dora,lora", "--metric", "boolq"])  # nothing is left to do
    said = capsys.readouterr().out
    assert "2 are finished.\n# Sweep" in said and "llm/boolq accuracy" in said
    assert state_of(output / "lora") == finished

    with pytest.raises(SystemExit) as caught:
        main(["sweep", "llm", recipe, "--adapter.kind", "dora,lora", "--train.lr", "2e-3"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.strip() == (
        f"error: {output / 'dora'} holds a run of another recipe: train.lr was 0.001 and is now 0.002. Give another "
        f"--output to keep both, or delete {output / 'dora'} to run it anew."
    )
    main(["sweep", "llm", recipe, "--adapter.kind", "lora,dora", "--jobs", "2", "--output", "runs/at_once"])
    said = capsys.readouterr().out
    assert "[1/2] lora\n" in said and "[2/2] dora\n" in said and f"\nlora: {NUM_STEPS} steps, training loss" in said
    losses = [[row["loss"] for row in read_metrics(path) if "loss" in row] for path in
              (output / "lora" / "metrics.jsonl", Path("runs/at_once/lora/metrics.jsonl"))]  # fmt: skip
    assert losses[0] == losses[1]

    (output / "lora" / "results" / "after" / "results.json").unlink()
    (output / "dora" / "config.yaml").write_text("train: {lr: 1}\n")
    with pytest.raises(SystemExit):
        main(["sweep", "llm", recipe, "--adapter.kind", "dora,lora"])
    assert "It is of a run of an earlier version or of another pipeline. Give" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["small.yaml"], "error: No field has several values"),
        (["small.yaml", "--adapter.rank", "4,8", "--metric", "bolq"], "error: Unknown metric 'bolq'. Did you mean ll"),
        (["small.yaml", "--adapter.rank", "4,8", "--time-limit", "0"], "error: --time-limit is 0.0; it must be"),
        (["small.yaml", "--adapter.rank", "4,8", "--jobs", "0"], "error: --jobs is 0; it must be 1 or more"),
        (["small.yaml", "--adapter.rank", "4,8", "--num_gpus", "0"], "error: --num_gpus is 0; it must be 1 or more"),
        (["small.yaml", "--adapter.rank", "4,8", "--num_gpus", "four"], "argument --num_gpus: invalid int value"),
    ],
)
def test_a_mistake_ends_in_one_message_before_any_run(recipe, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "llm", *words])
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_folder_that_another_sweep_is_working_in_is_left_alone(recipe, capsys):
    Path("there").mkdir()
    with lock_folder(Path("there"), "wait"), pytest.raises(SystemExit):
        main(["sweep", "llm", recipe, "--adapter.rank", "4,8", "--output", "there"])
    assert "there is in use by another process. Wait for it, or give another --output." in capsys.readouterr().err


def test_the_recipe_of_one_pipeline_needs_no_pipeline_and_of_several_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "llama_7b_dora_r32", "--adapter.rank", "4,0"])
    assert "adapter.rank is 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sweep", "tiny", "--adapter.rank", "4,8"])
    assert "Say which: dora sweep llm tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sweep", "--adapter.rank", "4,8"])
    assert "dora sweep needs a recipe" in capsys.readouterr().err


@pytest.mark.parametrize(("num_gpus", "words", "ranks"), [(8, [], 8), (8, ["--jobs", "4"], 2), (2, ["--jobs", "4"], 1),
                                                          (8, ["--jobs", "4", "--num_gpus", "4"], 4)])  # fmt: skip
def test_runs_at_once_share_the_gpus(recipe, monkeypatch, num_gpus, words, ranks):
    taken = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    monkeypatch.setattr("dora_core.sweep.command._run_all", lambda *given: taken.append(given[3].num_gpus))
    with pytest.raises(SystemExit):
        main(["sweep", "llm", recipe, "--adapter.kind", "lora,dora", "--train.global_batch_size", "16", *words])
    assert taken == [ranks]


def test_help_says_what_spans_a_grid(capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    said = capsys.readouterr().out
    assert "dora sweep llm tiny --adapter.rank 4,8,16 --run.seed 0,1,2" in said and "--together" in said
