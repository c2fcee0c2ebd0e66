"""A rank that is killed: the others stop with one message, and the run goes on from its newest whole checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import finish, processes_of, start, wait_until

from dora_core.engine.distributed import free_port
from dora_core.training.checkpoint import CheckpointStore
from dora_core.training.metrics import read_metrics

RANK = """
import ctypes, os, sys, time
from dora_core.engine.distributed import World
from dora_core.engine.peers import Peers
world = World.start()
peers = Peers(world, lambda: "Start again.")
how = sys.argv[2]
open(f"{sys.argv[1]}/ready{world.rank}", "w").write(str(os.getpid()))
time.sleep(0.3 * world.rank)  # the ranks look at different times
if world.rank == 0 and how != "killed":
    peers.leave(how)
    sys.exit({"stopped": 75, "failed": 3}[how])
ctypes.CDLL(None).sleep(600)  # as a collective that never returns: no error, no Python in the main thread
"""


def process_of_rank(run: str, rank: int) -> int:
    for pid in processes_of(run):
        try:
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            started_by = Path(f"/proc/{parent}/cmdline").read_bytes()
        except OSError:
            continue
        if f"LOCAL_RANK={rank}".encode() in words and b"launch" in started_by:  # not one of its data workers
            return pid
    raise AssertionError("the rank is not running")


@pytest.mark.parametrize(("rank", "when"), [(0, "step"), (1, "step"), (0, "save"), (1, "save")])
def test_when_a_rank_is_killed_the_others_stop_with_one_message_and_the_run_goes_on(folder, rank, when):
    run = f"lost-{rank}-{when}-{os.getpid()}"
    every = "1" if when == "save" else "4"
    overrides = ["--run.name", run, "--train.max_steps", "5000", "--train.save_every", every, "--train.log_every", "1"]
    overrides += ["--train.eval_every", "5000", "--data.num_workers", "0"]
    metrics, store = folder / "runs" / run / "metrics.jsonl", CheckpointStore(folder / "runs" / run / "checkpoints")
    log = folder / "log"
    process = start(folder, overrides)
    assert wait_until(lambda: metrics.is_file() and len(read_metrics(metrics)) >= 6, 120), log.read_text()
    pid = process_of_rank(run, rank)
    if when == "save":
        deadline = time.monotonic() + 60
        while not any(not path.name.startswith("step-") for path in store.folder.iterdir()):
            assert time.monotonic() < deadline
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    assert process.wait(60) != 0
    assert wait_until(lambda: not processes_of(run), 60 - (time.monotonic() - began))
    said = log.read_text()
    (message,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert message.startswith(
        f"error: Rank {rank} (process {pid}) was killed or has crashed, and the others cannot go on without it."
    )
    assert "Traceback" not in said, said[-3000:]
    step = store.newest()
    assert step and message.endswith(f"Start it again with --run.resume auto, and it goes on from step {step}.")

    overrides[3] = str(step + 2)
    printed = finish(folder, [*overrides, "--run.resume", "auto"])
    assert f"step-{step:08d}" in next(line for line in printed.splitlines() if line.startswith("resumed from"))
    rows = [row["step"] for row in read_metrics(metrics) if "loss" in row]
    assert rows == list(range(1, step + 3))


@pytest.mark.parametrize(("how", "status"), [("killed", 1), ("stopped", 75), ("failed", 1)])
def test_ranks_whose_collective_never_returns_are_ended(tmp_path, how, status):
    ranks, logs = [], []
    port = str(free_port())
    for rank in range(4):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**os.environ, **{key: str(value) for key, value in variables.items()}, "CUDA_VISIBLE_DEVICES": ""}
        logs.append(tmp_path / f"log{rank}")
        with logs[-1].open("w") as log:
            words = [sys.executable, "-c", RANK, str(tmp_path), how]
            ranks.append(subprocess.Popen(words, stderr=log, env={**env, "OMP_NUM_THREADS": "1"}))
    assert wait_until(lambda: len([*tmp_path.glob("ready*")]) == 4, 120)
    if how == "killed":
        ranks[3].kill()
    assert [process.wait(30) for process in ranks][: 3 if how == "killed" else None][1:3] == [status, status]
    messages = [line for log in logs for line in log.read_text().splitlines() if line.startswith("error: ")]
    said = f"error: Rank 3 (process {ranks[3].pid}) was killed or has crashed, and the others cannot go on without it."
    assert messages == ([f"{said} Start again."] if how == "killed" else [])


@pytest.mark.parametrize("phase", ["scoring", "waiting for the other"])
def test_a_rank_that_is_killed_outside_of_steps_is_named_too(folder, phase):
    run = f"outside-{os.getpid()}"
    overrides = ["--run.name", run, "--train.max_steps", "1", "--data.num_workers", "0"]
    overrides += ["--evaluate.after_training", "true", "--evaluate.num_beams", "16", "--evaluate.max_new_tokens", "200"]
    log, adapter = folder / "log", folder / "runs" / run / "adapter" / "adapter_model.safetensors"
    process = start(folder, overrides)
    assert wait_until(adapter.is_file, 120), log.read_text()
    time.sleep(2)
    pid = process_of_rank(run, 1 if phase == "scoring" else 0)
    os.kill(pid, signal.SIGKILL)
    assert process.wait(60) not in (0, 75)
    assert wait_until(lambda: not processes_of(run), 60)
    (message,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert f"(process {pid}) was killed or has crashed" in message and "Traceback" not in log.read_text()


def test_a_run_that_is_told_to_stop_while_it_scores_says_nothing_of_lost_ranks(folder):
    run = f"told-{os.getpid()}"
    overrides = ["--run.name", run, "--evaluate.before_training", "true", "--data.num_workers", "0"]
    overrides += ["--evaluate.num_beams", "16", "--evaluate.max_new_tokens", "200"]
    log = folder / "log"
    process = start(folder, overrides)
    assert wait_until((folder / "runs" / run / "config.yaml").is_file, 120), log.read_text()
    time.sleep(6)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert wait_until(lambda: not processes_of(run), 60)
    assert "error: " not in log.read_text() and "Traceback" not in log.read_text(), log.read_text()[-2000:]
