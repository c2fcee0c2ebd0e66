"""Notice that another rank of this machine has died, so that nobody waits for it in a collective."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dora_core.adapters.agreement import RankFailureError
from dora_core.engine.distributed import World, start_time

EXIT_STOPPED = 75
"""Exit status of a run that was told to stop, saved and can be resumed (EX_TEMPFAIL)."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL_S = 1.0
LAST_WORDS_S = 3.0
"""How long a broken connection may be known before the end of the rank at its other side is."""


class LostRankError(RankFailureError):
    """Another rank was killed."""


class Peers:
    """The other ranks on this machine. Every rank must make one at the same time.

    A rank that is killed leaves the others in a collective: with NCCL they compute for ever, with gloo each ends in an
    error of its own. A thread looks every second whether their processes live. One that leaves by itself says so in a
    file beforehand, and one rank alone speaks of one that did not. Ranks on other machines notice by their broken
    connections or by the time limit of the collective.
    """

    def __init__(self, world: World, advice: Callable[[], str]) -> None:
        self._world, self._advice = world, advice
        own = (_machine(), os.getpid(), start_time(os.getpid()))
        ranks = world.gather(own)
        here = {rank: (pid, started) for rank, (machine, pid, started) in enumerate(ranks) if machine == own[0]}
        pid, started = here[min(here)]
        self._folder = Path(tempfile.gettempdir()) / f"dora-ranks-{os.getuid()}-{pid}-{started}"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._watched = {rank: process for rank, process in here.items() if rank != world.rank}
        self._stopped = threading.Event()
        self._lock = threading.RLock()  # a signal may come while this thread holds it
        if self._watched:
            threading.Thread(target=self._watch, name="peer-watch", daemon=True).start()

    def part(self) -> None:
        """Wait for all ranks, then let each end when it is done. Every rank must call it."""
        self._world.barrier()
        self.leave("done")
        self._world.barrier()  # nobody ends while another still watches
        shutil.rmtree(self._folder, ignore_errors=True)

    def leave(self, how: str) -> None:
        """Watch no longer, and say ``how`` this rank ends: ``done``, ``stopped`` or ``failed``."""
        with self._lock:
            if not self._stopped.is_set():
                self._stopped.set()
                self._mark(how)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Within the block an error that follows from the end of another rank becomes what ``refuse_lost`` raises."""
        try:
            yield
        except RuntimeError:
            deadline = time.monotonic() + LAST_WORDS_S
            while self._watched and time.monotonic() < deadline:
                self.refuse_lost()
                time.sleep(0.05)
            raise

    def refuse_lost(self) -> None:
        """Raise ``LostRankError`` if a rank was killed and nobody said so yet; end quietly if one left in another way.

        The launcher, which tells those that are left to stop, must not cut off the message: signals are ignored then.
        """
        found = self._leave_lost()
        if found is None:
            return
        status, message = found
        if message is None:
            raise SystemExit(status)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise LostRankError(message) from None

    def _leave_lost(self) -> tuple[int, str | None] | None:
        """Return what ``_lost`` does, once, and leave then."""
        with self._lock:  # or one thread would take the other's claim for another rank's
            found = None if self._stopped.is_set() else self._lost()
            if found is not None:
                self.leave("failed" if found[0] == 1 else "stopped")
            return found

    def _lost(self) -> tuple[int, str | None] | None:
        """Return the status to end with because another rank has ended, and the message if this rank is to give it."""
        gone = [rank for rank, (pid, started) in self._watched.items() if start_time(pid) != started]
        ends = {rank: self._read(rank) for rank in gone}
        killed = [rank for rank in gone if ends[rank] is None]
        if killed and self._claims():
            pid, _ = self._watched[killed[0]]
            what = (
                f"Rank {killed[0]} (process {pid}) was killed or has crashed, and the others cannot go on without it."
            )
            return 1, f"{what} {self._advice()}"
        if killed or "failed" in ends.values():
            return 1, None
        return (EXIT_STOPPED, None) if "stopped" in ends.values() else None

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_S):
            found = self._leave_lost()
            if found is not None:
                status, message = found
                if message is not None:
                    os.write(2, f"\nerror: {message}\n".encode())  # clear of a progress bar
                os._exit(status)  # the main thread may never return from its collective

    def _claims(self) -> bool:
        """Whether this rank is the first to speak."""
        try:
            os.close(os.open(self._folder / "spoken", os.O_CREAT | os.O_EXCL))
        except OSError:
            return False
        return True

    def _mark(self, how: str) -> None:
        path = self._folder / str(self._world.rank)
        try:
            path.with_suffix(".new").write_text(how)
            path.with_suffix(".new").replace(path)
        except OSError:  # the others then say that this rank was killed
            return

    def _read(self, rank: int) -> str | None:
        try:
            return (self._folder / str(rank)).read_text()
        except OSError:
            return None


def _machine() -> str:
    """Return what tells this machine, and this container on it, from others: processes are looked up there."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = boot.read_text().strip() if boot.is_file() else os.uname().nodename
    try:
        return f"{name} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return name
