"""The ranks of a run: start the process group, sum over it, notice when the launcher is gone."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dora_core.adapters.agreement import RankFailureError, agree, gather_objects

T = TypeVar("T")
FIRST_PORT = 10000
"""Services of a machine listen below."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @classmethod
    def start(cls, timeout_s: float = 1800.0) -> World:
        """Join the process group that a launcher describes in the environment, or a group of one without it.

        NCCL where there is a GPU, else gloo. Safe to call again: the group that exists is used.
        """
        cuda = torch.cuda.is_available()
        if "RANK" not in os.environ:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(free_port())
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        _quiet_deepspeed()
        import deepspeed
        import deepspeed.ops

        # DeepSpeed would compile this C++ op when it starts on a CPU, for minutes, and nothing here uses it. A build
        # that is killed leaves a lock behind that makes every later run wait for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized() or not deepspeed.comm.is_initialized():
            deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s), verbose=False)
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, device)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over ranks of a few numbers, in fp64. Every rank must call it."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's object, by rank, on every rank."""
        return gather_objects(value)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's object on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def agree(self, work: Callable[[], T] | None) -> T | None:
        """Do what ``agreement.agree`` says: for what must not leave the other ranks waiting, files above all."""
        return agree(work, gather_objects, self.rank if self.size > 1 else None)

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do ``work`` on rank 0 alone; as ``agree``, its failure raises on every rank."""
        return self.agree(work if self.is_main else None)

    def require_same(self, what: str, value: Any) -> None:
        """Raise ``RankFailureError`` on every rank unless all have an equal ``value``."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            different = next(rank for rank, other in enumerate(values) if other != values[0])
            raise RankFailureError(
                f"Rank {different} has other {what} than rank 0; all ranks must have the same. Put the same files on "
                "every node."
            )

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)


def bound_collectives(timeout_s: float) -> None:
    """Apply the time limit to every process group that exists.

    DeepSpeed makes groups without one, so a rank that stalls would hold the others for torch's half hour.
    """
    from torch.distributed import distributed_c10d

    set_timeout = getattr(dist, "set_timeout", distributed_c10d._set_pg_timeout)  # public since torch 2.15
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(timedelta(seconds=timeout_s), group)


def stop_with_launcher(poll_s: float = 1.0) -> None:
    """Send this process SIGTERM once its launcher is gone, so that no rank is left behind as an orphan.

    The ``deepspeed`` command dies of SIGTERM at once and leaves its node launcher and ranks running; so the chain of
    launcher processes above this one is watched.
    """
    watched = _launcher_ancestors()
    if not watched:
        return

    def watch() -> None:
        while all(start_time(pid) == started for pid, started in watched.items()):
            threading.Event().wait(poll_s)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _launcher_ancestors() -> dict[int, str]:
    found: dict[int, str] = {}
    pid = os.getppid()
    while pid > 1:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        if not any(word in command for word in ("deepspeed", "torchrun", "torch.distributed")):
            break
        found[pid] = start_time(pid)
        pid = parent
    return found


def start_time(pid: int) -> str:
    """Return when a process began, in the kernel's ticks, or nothing if it has ended.

    An identifier can be taken again; the start time tells the two apart.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on.

    A launcher needs seconds until it listens there, so it is none of those that the system gives to connections
    meanwhile, where there are others: with several runs at once that happens.
    """
    try:
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        low = 0
    ports = range(FIRST_PORT, low)
    drawn = random.SystemRandom().sample(ports, min(100, len(ports)))  # a run's seed must not choose
    for port in [*drawn, 0]:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise AssertionError("a port of the system's own choice is always free")


def _quiet_deepspeed() -> None:
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
