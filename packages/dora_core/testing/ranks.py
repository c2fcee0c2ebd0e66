"""Run a function on several CPU ranks over gloo, in processes that are started once and used again."""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from dora_core.engine.distributed import World, free_port

_pools: dict[int, _Pool] = {}


class RankError(RuntimeError):
    """A rank raised, died, or did not answer in time; the message holds what each rank said."""


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Return ``[function(world, *args) on rank 0, on rank 1, ...]``.

    ``function`` is a top-level function of a file (which is imported anew in the ranks) and takes a ``World`` first;
    arguments and results are pickled. After a failure the processes are replaced, since a rank may be stuck.
    """
    pool = _pools.get(world_size)
    if pool is None or not pool.alive():
        pool = _pools[world_size] = _Pool(world_size)
    try:
        return pool.run(str(Path(sys.modules[function.__module__].__file__)), function.__qualname__, args, timeout_s)
    except RankError:
        pool.kill()
        del _pools[world_size]
        raise


class _Pool:
    def __init__(self, world_size: int) -> None:
        port = free_port()
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "CUDA_VISIBLE_DEVICES": "",
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            }
            before = dict(os.environ)
            os.environ.update(environment)  # a spawned process reads some of these while it imports torch
            try:
                process = context.Process(target=_serve, args=(there,), daemon=True)
                process.start()
            finally:
                os.environ.clear()
                os.environ.update(before)
            self.pipes.append(here)
            self.processes.append(process)
        atexit.register(self.kill)

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def run(self, file: str, name: str, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((file, name, args))
        deadline = time.monotonic() + timeout_s
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < len(self.pipes):
            for rank, pipe in enumerate(self.pipes):
                if rank not in answers and pipe.poll(0.01):
                    try:
                        answers[rank] = pipe.recv()
                    except EOFError:
                        answers[rank] = (False, f"died with status {self.processes[rank].exitcode}")
            failed = [rank for rank, (ok, _) in answers.items() if not ok]
            if failed:
                deadline = min(deadline, time.monotonic() + 2.0)  # let the others say what they saw
            if time.monotonic() > deadline:
                break
        if any(not ok for ok, _ in answers.values()) or len(answers) < len(self.pipes):
            said = [f"rank {r}: {answers[r][1] if r in answers else 'no answer'}" for r in range(len(self.pipes))]
            raise RankError(f"{name} failed on {len(self.pipes)} ranks within {timeout_s:.0f} s\n" + "\n".join(said))
        return [answers[rank][1] for rank in range(len(self.pipes))]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(5)


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    world = World.start(timeout_s=300.0)
    modules: dict[str, Any] = {}
    while True:
        try:
            file, name, args = pipe.recv()
        except EOFError:
            return
        try:
            if file not in modules:
                spec = importlib.util.spec_from_file_location(f"ranks_{len(modules)}", file)
                modules[file] = importlib.util.module_from_spec(spec)
                sys.modules[spec.name] = modules[file]
                spec.loader.exec_module(modules[file])
            pipe.send((True, getattr(modules[file], name)(world, *args)))
        except BaseException:  # a rank must answer, whatever happened
            pipe.send((False, traceback.format_exc()))
