"""A checkpoint is whole or absent, and a damaged one is never loaded."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from dora_core.training.checkpoint import CheckpointStore, publish
from dora_core.training.progress import Progress


def write(store: CheckpointStore, step: int, size: int = 2000) -> Path:
    temporary = store.folder / f".tmp-step-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
        (temporary / name).write_bytes(os.urandom(size))
    publish(temporary, store.path(step))
    return store.path(step)


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (10, 20, 30):
        write(store, step)
    return store


def test_the_newest_checkpoint_wins(store):
    assert store.newest() == 30
    assert store.steps() == [10, 20, 30]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: (p / "weights.safetensors").write_bytes(b"x" * 2000), "is not as it was written"),
        (lambda p: (p / "weights.safetensors").write_bytes(b"x" * 10), "is not as it was written"),
        (lambda p: (p / "optimizer.safetensors").write_bytes(b""), "is not as it was written"),
        (lambda p: (p / "state.json").unlink(), "state.json is missing"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text(""), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text('{"schema": 99, "files": {}}'), "schema 99 is not 1"),
        (lambda p: [f.unlink() for f in p.iterdir()], "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_its_reason_and_the_one_before_is_used(store, damage, reason):
    damage(store.path(30))
    said = []
    assert store.newest(said.append) == 20
    assert len(said) == 1
    assert "step-00000030 is skipped" in said[0]
    assert reason in said[0]


def test_a_single_flipped_bit_is_noticed(store):
    file = store.path(30) / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[1234] ^= 1
    file.write_bytes(data)
    assert store.verify(30) == "weights.safetensors is not as it was written"


def test_there_is_no_newest_checkpoint_if_none_verifies(store):
    for step in store.steps():
        (store.path(step) / "manifest.json").unlink()
    assert store.newest(lambda text: None) is None


def test_pruning_keeps_the_last_and_the_best(store):
    write(store, 40)
    store.prune(keep_last=2, keep_step=10, step=40)
    assert store.steps() == [10, 30, 40]


def test_pruning_never_counts_what_is_later_than_the_step_just_saved(store):
    (store.path(30) / "manifest.json").unlink()
    write(store, 25)
    store.prune(keep_last=1, keep_step=None, step=25)
    assert store.newest(lambda text: None) == 25
    store.drop_after(25)
    assert store.steps() == [25]


def save_for_ever(folder: Path, started) -> None:
    store = CheckpointStore(folder)
    for step in range(1, 10_000):
        write(store, step, size=50_000)
        store.prune(keep_last=2, keep_step=None, step=step)
        started.set()  # from the first whole one on


def test_kills_at_random_moments_never_leave_a_checkpoint_that_does_not_verify(tmp_path):
    context = multiprocessing.get_context("fork")
    dice = random.Random(0)
    num_temporary = 0
    for attempt in range(25):
        folder = tmp_path / str(attempt)
        started = context.Event()
        process = context.Process(target=save_for_ever, args=(folder, started))
        process.start()
        assert started.wait(20)
        time.sleep(0.03 + 0.1 * dice.random())
        process.kill()
        process.join()
        store = CheckpointStore(folder)
        num_temporary += len(list(folder.glob(".tmp-*")))
        assert store.steps()
        newest = store.newest(lambda text: None)
        # only an old checkpoint may be half deleted, by pruning; the newest always verifies
        assert newest == store.steps()[-1]
        store.clean()
        assert not list(folder.glob(".tmp-*"))
    assert num_temporary > 0, "no kill fell into a save; the test shows nothing"


def test_progress_knows_what_is_due_and_which_step_was_best():
    progress = Progress()
    for loss in (3.0, 2.0, 2.5):
        progress.advance(num_tokens=100.0, num_targets=90.0)
        progress.note_validation(loss)
    assert (progress.step, progress.num_tokens, progress.best_step, progress.best_loss) == (3, 300, 2, 2.0)
    progress.note_validation(float("nan"))
    assert progress.best_loss == 2.0
    assert progress.due(3, num_steps=10)
    assert not progress.due(2, num_steps=10)
    assert progress.due(None, num_steps=3)
    assert Progress(**json.loads(json.dumps(progress.to_json()))) == progress
