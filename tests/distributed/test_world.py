"""The ranks talk to each other, and none waits for one that failed."""

from __future__ import annotations

import pytest

from dora_core.testing.ranks import RankError, run_on_ranks


def talk(world):
    return (
        world.sum([world.rank + 1, 0.5]),
        world.gather(f"rank {world.rank}"),
        world.broadcast(world.rank),
        world.on_main(lambda: world.rank),
        world.agree(lambda: world.rank),
    )


def test_sums_gathers_and_broadcasts():
    said = ([3.0, 1.0], ["rank 0", "rank 1"], 0)
    assert run_on_ranks(talk, 2) == [(*said, 0, 0), (*said, None, 1)]


def fail_on(world, rank):
    def work():
        if world.rank == rank:
            raise OSError("no room left")

    try:
        world.agree(work)
    except ValueError as error:
        return str(error)
    return "went on"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_on_one_rank_is_raised_on_all(rank):
    assert run_on_ranks(fail_on, 2, rank) == [f"rank {rank}: OSError: no room left"] * 2


def break_rank_one(world):
    if world.rank == 1:
        raise RuntimeError("this rank is broken")
    world.barrier()


def test_a_rank_that_breaks_is_reported_and_does_not_hang_the_test():
    with pytest.raises(RankError, match=r"(?s)rank 1: .*this rank is broken"):
        run_on_ranks(break_rank_one, 2, timeout_s=30)


def test_a_difference_between_ranks_is_an_error_on_all_of_them():
    assert run_on_ranks(differ, 2) == ["Rank 1 has other rows than rank 0"] * 2


def differ(world):
    world.require_same("rows", "equal")
    try:
        world.require_same("rows", world.rank)
    except ValueError as error:
        return str(error).partition(";")[0]
