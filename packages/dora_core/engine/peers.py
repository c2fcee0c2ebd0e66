"""Notice that another rank of this machine has died, so that nobody waits for it in a collective."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dora_core.engine.distributed import RankFailureError, World, start_time

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL_S = 1.0
LAST_WORDS_S = 3.0
"""How long a broken connection may be known before the death of the rank at its other end is."""


class LostRankError(RankFailureError):
    """Another rank is gone."""

    def __init__(self, message: str, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks
        """Whether this rank is the one that should tell the user."""


class Peers:
    """The other ranks on this machine. Every rank must make one at the same time.

    A rank that is killed leaves the others in a collective: with NCCL they compute for ever, with gloo each ends in an
    error of its own. A thread looks every second whether their processes live. Ranks on other machines notice by their
    broken connections or by the time limit of the collective.
    """

    def __init__(self, world: World, advice: Callable[[], str]) -> None:
        self._world, self._advice = world, advice
        own = (_machine(), os.getpid(), start_time(os.getpid()))
        others = world.gather(own)
        self._watched = {
            rank: (pid, started)
            for rank, (machine, pid, started) in enumerate(others)
            if machine == own[0] and rank != world.rank
        }
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        if self._watched:
            threading.Thread(target=self._watch, name="peer-watch", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer."""
        with self._lock:
            self._stopped.set()

    def part(self) -> None:
        """Let the ranks end, each when it is done. Every rank must call it."""
        self.stop()
        self._world.barrier()

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Within the block an error that follows from the end of another rank becomes ``LostRankError``.

        The launcher, which tells those that are left to stop, must not cut off the message: signals are ignored then.
        """
        try:
            yield
        except RuntimeError as error:
            deadline = time.monotonic() + LAST_WORDS_S
            while (lost := self._lost()) is None:
                if not self._watched or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            self.stop()
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            raise lost from error

    def _lost(self) -> LostRankError | None:
        gone = {rank for rank, (pid, started) in self._watched.items() if start_time(pid) != started}
        if not gone:
            return None
        first = min(gone)
        speaks = self._world.rank == min({self._world.rank, *self._watched} - gone)
        message = (
            f"Rank {first} (process {self._watched[first][0]}) has ended, and the others cannot go on without it. "
        )
        return LostRankError(message + self._advice(), speaks)

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_S):
            lost = self._lost()
            with self._lock:
                if lost is None or self._stopped.is_set():
                    continue
                if lost.speaks:
                    os.write(2, f"\nerror: {lost}\n".encode())  # clear of a progress bar
                os._exit(1)  # the main thread may never return from its collective


def _machine() -> str:
    """Return what tells this machine, and this container on it, from others: processes are looked up there."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = boot.read_text().strip() if boot.is_file() else os.uname().nodename
    try:
        return f"{name} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return name
