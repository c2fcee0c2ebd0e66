"""Several launches at once: small models leave most of a GPU, or of a node's GPUs, idle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import TypeVar

from dora_core.training.launcher import Stop, signals_interrupt

Result = TypeVar("Result")
Job = Callable[[int, Stop], Result]
"""Takes its place among those that run at once, and what tells it to stop: ``launch_command``'s and ``launch``'s."""


def run_jobs(jobs: Sequence[Job[Result]], num_at_once: int, done: Callable[[Result], None]) -> None:
    """Run ``jobs``, ``num_at_once`` at a time; ``done`` gets each result in this thread as soon as it is there.

    Ctrl-C, SIGTERM and SIGHUP, which raise ``KeyboardInterrupt`` here, and an error in a job stop all of them, so that
    they can be resumed; another Ctrl-C does not wait until they have saved. One at a time runs in this thread.
    """
    stop = Stop()
    if num_at_once == 1:
        for job in jobs:
            done(job(0, stop))
        return
    places: SimpleQueue[int] = SimpleQueue()
    for place in range(num_at_once):
        places.put(place)

    def run(job: Job[Result]) -> Result:
        place = places.get()
        try:
            return job(place, stop)
        finally:
            places.put(place)

    with signals_interrupt(), ThreadPoolExecutor(num_at_once) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        try:
            for future in as_completed(futures):
                done(future.result())
        except BaseException:
            stop.asked.set()
            try:
                pool.shutdown(cancel_futures=True)
            except KeyboardInterrupt:
                stop.at_once.set()
            raise
