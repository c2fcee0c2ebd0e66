"""Profiles of steps: shares of device time by hand, and the files of a run."""

import gzip
import json

import pytest
import torch

from dora_core.training.profiling import StepProfiler, device_shares


def test_shares_are_those_by_hand():
    events = [
        ("gemm", 0.0, 4.0),
        ("ncclDevKernel_AllReduce_Sum_bf16", 3.0, 6.0),  # one of three beside the product
        ("ncclDevKernel_AllGather_RING_LL", 5.0, 7.0),  # on another stream
        ("gemm", 8.0, 10.0),
    ]
    assert device_shares(events) == pytest.approx({"communication": 0.4, "exposed": 0.3, "idle": 0.1})
    assert device_shares([]) == {"communication": 0.0, "exposed": 0.0, "idle": 0.0}


def test_three_steps_are_profiled(tmp_path):
    profiler = StepProfiler(2, tmp_path, print)
    for step in range(1, 7):
        torch.ones(8) @ torch.ones(8)
        profiler.after_step(step)
        assert (tmp_path / "profile.json").exists() == (step >= 4)
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content["steps"] == [2, 4]
    with gzip.open(tmp_path / "trace.json.gz") as file:
        assert sum(event.get("name") == "aten::dot" for event in json.load(file)["traceEvents"]) == 3
    profiler.finish()
    none = StepProfiler(None, tmp_path / "absent", print)
    none.after_step(1)
    none.finish()


@pytest.mark.parametrize(
    ("first", "steps", "profiled"), [(3, (1, 2, 3), [3, 3]), (3, (5, 6), None), (4, (1, 2, 3), None)]
)
def test_a_run_that_is_shorter_says_what_was_profiled(tmp_path, first, steps, profiled):
    said = []
    profiler = StepProfiler(first, tmp_path, said.append)
    for step in steps:
        profiler.after_step(step)
    profiler.finish()
    if profiled is None:
        assert not (tmp_path / "profile.json").exists()
        assert said == [f"log.profile_step is {first}, and no step from it on began and ended here, up to step "
                        f"{steps[-1]}: nothing was profiled."]  # fmt: skip
    else:
        assert json.loads((tmp_path / "profile.json").read_text())["steps"] == profiled and not said
