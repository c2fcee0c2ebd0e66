"""Training under the ``deepspeed`` command: it stops when told to, leaves no process behind, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launched import command, environment, finish, processes_of, start, wait_until

from dora_core.training.checkpoint import CheckpointStore
from dora_core.training.metrics import read_metrics


def test_sigterm_to_the_launcher_saves_stops_every_rank_and_the_run_goes_on(folder):
    run = f"stopped-{os.getpid()}"
    overrides = ["--run.name", run, "--train.max_steps", "5000", "--train.save_every", "5000", "--train.log_every", "1"]
    overrides += ["--data.num_workers", "2"]
    metrics = folder / "runs" / run / "metrics.jsonl"
    process = start(folder, overrides)
    assert wait_until(lambda: metrics.is_file() and len(read_metrics(metrics)) >= 3, 120), (folder / "log").read_text()
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    # The deepspeed command itself dies at once; the ranks notice, save and leave.
    assert wait_until(lambda: not processes_of(run), 60), "processes were left behind"
    store = CheckpointStore(folder / "runs" / run / "checkpoints")
    step = store.newest()
    assert step is not None, (folder / "log").read_text()
    assert f"stopped on request at step {step}" in (folder / "log").read_text()
    assert "Traceback" not in (folder / "log").read_text()

    overrides[3] = str(step + 2)
    said = finish(folder, [*overrides, "--run.resume", "must"])
    assert f"resumed from {Path('runs') / run / 'checkpoints'}/step-{step:08d}" in said
    assert [row["step"] for row in read_metrics(metrics) if "loss" in row][-2:] == [step + 1, step + 2]
    assert (folder / "runs" / run / "adapter" / "adapter_model.safetensors").is_file()


def test_a_whole_process_tree_that_is_told_to_stop_saves_and_exits_with_status_75(folder):
    run = folder / "runs" / "alone"
    words = [sys.executable, "-m", "dora_core.cli", "train", "llm", "--config", "tiny", "--run.name", "alone"]
    words += ["--train.max_steps", "5000", "--train.save_every", "5000", "--train.log_every", "1"]
    words += ["--data.num_workers", "2"]  # they get the signal too
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, env=environment(), start_new_session=True)
        metrics = run / "metrics.jsonl"
        assert wait_until(lambda: metrics.is_file() and len(read_metrics(metrics)) >= 3, 120), (
            folder / "log"
        ).read_text()
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 75
    assert CheckpointStore(run / "checkpoints").newest() is not None
    assert "Traceback" not in (folder / "log").read_text()


def test_a_run_that_is_told_to_stop_while_it_scores_stops(folder):
    words = [sys.executable, "-m", "dora_core.cli", "train", "llm", "--config", "tiny", "--run.name", "scoring"]
    words += ["--evaluate.before_training", "true", "--evaluate.num_beams", "16", "--evaluate.max_new_tokens", "200"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, env=environment())
        assert wait_until((folder / "runs" / "scoring" / "config.yaml").is_file, 120)
        time.sleep(4)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75
    assert not (folder / "runs" / "scoring" / "checkpoints").exists()
    assert "Traceback" not in (folder / "log").read_text()


def test_a_users_mistake_under_the_launcher_ends_in_one_message(folder):
    done = subprocess.run(
        command("--adapter.targets", "[q_prj]"),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "Did you mean q_proj" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
