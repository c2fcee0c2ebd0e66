"""A run that stops and goes on is the run that did not stop."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cases import make_engine, progress_at, train_steps

from dora_core.engine.state import gather_state
from dora_core.testing.limits import limited_file_size
from dora_core.testing.ranks import RankError, run_on_ranks
from dora_core.training.checkpoint import CheckpointError, CheckpointStore

DROPOUT = {"dropout": 0.1}


def stop_and_resume(world, model, folder, case):
    """Return (losses, weights) of steps 3 to 6: uninterrupted, and from a checkpoint in a new engine."""
    store = CheckpointStore(Path(folder))
    torch.manual_seed(world.rank)
    engine = make_engine(world, model, case)
    train_steps(engine, 0, 3)
    store.save(engine, progress_at(3))
    expected = train_steps(engine, 3, 6), gather_state(engine)
    torch.manual_seed(1234)
    resumed = make_engine(world, model, case)
    progress = store.restore(resumed, store.newest())
    assert progress == progress_at(3)
    return expected, (train_steps(resumed, 3, 6), gather_state(resumed))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bit_exact_with_dropout(model_folder, tmp_path, stage, world_size):
    case = {"stage": stage, "accumulation": 2, "adapter": DROPOUT}
    expected, resumed = run_on_ranks(stop_and_resume, world_size, model_folder, tmp_path, case)[0]
    assert resumed[0] == expected[0]
    (weights, moments, count), (weights_expected, moments_expected, count_expected) = resumed[1], expected[1]
    assert count == count_expected == 6
    assert weights.keys() == weights_expected.keys()
    assert all(torch.equal(weights[name], weights_expected[name]) for name in weights)
    assert len(moments) == 2 * len(weights)
    assert all(torch.equal(moments[name], moments_expected[name]) for name in moments)


@pytest.mark.parametrize(
    "case", [{"precision": "bf16"}, {"optimizer": "sgd"}, {"adapter": {"kind": "full", "targets": ".*"}}]
)
def test_resume_is_bit_exact_for_other_types_optimizers_and_kinds(model_folder, tmp_path, case):
    expected, resumed = run_on_ranks(stop_and_resume, 2, model_folder, tmp_path, {"stage": 2, **case})[0]
    assert resumed[0] == expected[0]


def first_part(world, model, folder, case):
    engine = make_engine(world, model, case)
    train_steps(engine, 0, 3)
    CheckpointStore(Path(folder)).save(engine, progress_at(3))
    return train_steps(engine, 3, 6)


def second_part(world, model, folder, case):
    store = CheckpointStore(Path(folder))
    engine = make_engine(world, model, case)
    store.restore(engine, store.newest())
    return train_steps(engine, 3, 6)


@pytest.mark.parametrize(("before", "after"), [((2, 3), (1, 0)), ((1, 0), (2, 2)), ((2, 2), (2, 3)), ((2, 1), (1, 3))])
def test_resume_works_on_another_number_of_ranks_and_in_another_stage(model_folder, tmp_path, before, after):
    (old_ranks, old_stage), (new_ranks, new_stage) = before, after
    expected = run_on_ranks(first_part, old_ranks, model_folder, tmp_path, {"stage": old_stage})[0]
    resumed = run_on_ranks(second_part, new_ranks, model_folder, tmp_path, {"stage": new_stage})[0]
    assert resumed == pytest.approx(expected, abs=1e-6)


def test_a_checkpoint_of_another_configuration_is_refused_by_name(model_folder, tmp_path):
    run_on_ranks(first_part, 1, model_folder, tmp_path, {})
    with pytest.raises(RankError, match="trains other parameters than this configuration"):
        run_on_ranks(second_part, 1, model_folder, tmp_path, {"adapter": {"targets": ["q_proj"]}})
    with pytest.raises(RankError, match=r"lora_A has shape \(4, 32\), this configuration's \(8, 32\)"):
        run_on_ranks(second_part, 1, model_folder, tmp_path, {"adapter": {"rank": 8}})


def save_where_a_file_is(world, model, folder):
    store = CheckpointStore(Path(folder) / "file")
    if world.is_main:
        store.folder.write_text("in the way")
    world.barrier()
    try:
        store.save(make_engine(world, model, {"stage": 2}), progress_at(1))
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_what_only_rank_0_cannot_write_is_an_error_on_every_rank(model_folder, tmp_path):
    for said in run_on_ranks(save_where_a_file_is, 2, model_folder, tmp_path):
        assert "could not be written" in said
        assert "rank 0: " in said


def restore_with(world, model, folder, facts):
    store = CheckpointStore(Path(folder))
    engine = make_engine(world, model, {})
    if not store.steps():
        store.save(engine, progress_at(1), {"data": "abc", "train.optimizer": "adamw"})
    return store.restore(engine, 1, facts).step


def test_a_run_goes_on_only_with_its_own_rows_and_optimizer(model_folder, tmp_path):
    same = {"data": "abc", "train.optimizer": "adamw"}
    assert run_on_ranks(restore_with, 1, model_folder, tmp_path, same) == [1]
    with pytest.raises(RankError, match=r"written with train\.optimizer 'adamw'; it is now 'sgd'"):
        run_on_ranks(restore_with, 1, model_folder, tmp_path, {**same, "train.optimizer": "sgd"})


def save_on_a_full_disk(world, model, folder):
    store = CheckpointStore(Path(folder))
    engine = make_engine(world, model, {"stage": 2})
    store.save(engine, progress_at(1))
    try:
        with limited_file_size(2000):
            store.save(engine, progress_at(2))
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_full_disk_is_one_clear_error_on_every_rank_and_costs_no_older_checkpoint(model_folder, tmp_path):
    for said in run_on_ranks(save_on_a_full_disk, 2, model_folder, tmp_path):
        assert "The checkpoint of step 2 could not be written" in said
        assert "Older checkpoints are whole" in said
    store = CheckpointStore(tmp_path)
    assert store.steps() == [1]
    assert store.newest() == 1
    assert not list(tmp_path.glob(".tmp-*"))
