"""A launched script: its log, its end, and that nothing of it is left running."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from dora_core.config import ConfigError
from dora_core.training.launcher import launch, launch_command


def processes_of(folder: Path) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(folder) in words:
            found.append(int(file.parent.name))
    return found


@pytest.mark.parametrize(("code", "status"), [(0, "finished"), (1, "failed"), (75, "stopped")])
def test_a_result_says_how_the_command_ended(tmp_path, code, status):
    script = f"import os, sys; print('out', os.environ['EXTRA']); print('err', file=sys.stderr); sys.exit({code})"
    for _ in range(2):
        result = launch([sys.executable, "-c", script], tmp_path / "log", environment={"EXTRA": "7"})
        assert (result.status, result.exit_status, result.timed_out) == (status, code, False)
    assert 0 < result.seconds < 30
    assert sorted(result.log.read_text().split("\n")) == ["", "err", "err", "out 7", "out 7"]  # added to, not replaced


def test_at_the_time_limit_the_rank_saves_and_nothing_is_left_running(tmp_path, chain):
    result = launch(chain(0.5), tmp_path / "log", time_limit_s=3)
    assert result.timed_out and result.status == "timed out"
    assert (tmp_path / "saved").exists()
    assert not processes_of(tmp_path)
    assert "1/20" in result.log.read_text()


def test_a_rank_that_takes_too_long_to_save_is_killed(tmp_path, chain):
    started = time.monotonic()
    result = launch(chain(500), tmp_path / "log", time_limit_s=2, patience_s=1)
    assert result.timed_out and time.monotonic() - started < 30
    assert not (tmp_path / "saved").exists() and not processes_of(tmp_path)


@pytest.mark.usefixtures("signals_of_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_run_and_raises(tmp_path, chain, number):
    def send_when_ready():
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=send_when_ready, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        launch(chain(0.2), tmp_path / "log")
    assert (tmp_path / "saved").exists() and not processes_of(tmp_path)
    assert signal.getsignal(number) == before


def test_the_command_names_the_script_its_ranks_and_the_visible_gpus(monkeypatch):
    words = launch_command(Path("train.py"), ["--config", "tiny"], 2)
    assert words[1:3] == ["--num_gpus", "2"] and words[-3:] == ["train.py", "--config", "tiny"]
    assert launch_command("dora_audio.train", ["--config", "tiny"], 2)[-4:-2] == ["--module", "dora_audio.train"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,0")
    assert launch_command(Path("train.py"), [], 2)[1:3] == ["--include", "localhost:3,1"]


def test_launches_at_once_take_the_gpus_in_turn(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def devices(num_ranks: int, place: int) -> list[str]:
        return launch_command(Path("train.py"), [], num_ranks, place)[1:3]

    assert devices(2, 0) == ["--num_gpus", "2"]
    assert [devices(2, place)[1] for place in (1, 2, 3)] == ["localhost:2,3", "localhost:0,1", "localhost:2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3")
    assert [devices(2, place)[1] for place in (0, 1, 2)] == ["localhost:7,5", "localhost:3,7", "localhost:5,3"]
    assert devices(4, 1) == ["--include", "localhost:5,3,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937,GPU-d1e2f3a4")
    assert devices(1, 0) == ["--num_gpus", "1"]
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES is 'GPU-8932f937.*Give numbers"):
        devices(1, 1)
