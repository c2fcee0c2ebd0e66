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
    profiler = StepProfiler(2, tmp_path)
    for step in range(1, 7):
        torch.ones(8) @ torch.ones(8)
        profiler.after_step(step)
        assert (tmp_path / "profile.json").exists() == (step >= 4)
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content["steps"] == [2, 4]
    with gzip.open(tmp_path / "trace.json.gz") as file:
        assert sum(event.get("name") == "aten::dot" for event in json.load(file)["traceEvents"]) == 3
    StepProfiler(None, tmp_path / "absent").after_step(1)
