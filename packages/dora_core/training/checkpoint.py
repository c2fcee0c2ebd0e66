"""Checkpoints that are complete or absent: written aside, fsynced, listed with SHA-256, then renamed.

``step-00000120/`` holds ``weights.safetensors`` (what is trained), ``optimizer.safetensors``, ``state.json``,
``rng-<rank>.safetensors`` and, written last, ``manifest.json``. Tensors are whole and by name, so another number of
ranks or another ZeRO stage can resume. The newest folder whose manifest verifies wins; there is no pointer to go stale.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_core.engine.build import Engine
from dora_core.engine.state import gather_state, restore_state
from dora_core.training.progress import Progress

SCHEMA = 1
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint that was asked for is missing, damaged or of another run."""


class CheckpointStore:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Return the steps that have a folder, oldest first, verified or not."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Return the folder of a step."""
        return self.folder / f"step-{step:08d}"

    def save(self, engine: Engine, progress: Progress) -> Path:
        """Write the checkpoint of ``progress.step``. Every rank must call it; it returns when the files are safe.

        A failure on any rank (a full disk) raises ``CheckpointError`` on all of them; older checkpoints stay whole.
        """
        world = engine.world
        weights, moments, count = gather_state(engine)
        final = self.path(progress.step)
        temporary = self.folder / f".tmp-{final.name}"
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        world.barrier()
        problem = None
        try:
            _save_random_state(temporary / f"rng-{world.rank:05d}.safetensors")
            if world.is_main:
                save_file(weights, temporary / "weights.safetensors")
                save_file(moments, temporary / "optimizer.safetensors")
                state = {
                    "progress": progress.to_json(),
                    "optimizer_steps": count,
                    "loss_scale": [engine.loss_scale.value, engine.loss_scale.num_good_steps],
                    "world_size": world.size,
                }
                (temporary / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        except Exception as error:  # whatever it is, the other ranks must hear of it before this one leaves
            problem = f"rank {world.rank}: {error}"
        problems = [text for text in world.gather(problem) if text]
        if problems:
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"The checkpoint of step {progress.step} could not be written to {self.folder} ({problems[0]}). Older "
                "checkpoints are whole. Make room or check permissions, then resume with run.resume: auto."
            )
        if world.is_main:
            publish(temporary, final)
        world.barrier()
        return final

    def verify(self, step: int) -> str | None:
        """Return what is wrong with the checkpoint of ``step``, or None if every file is as it was written."""
        folder = self.path(step)
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if manifest["schema"] != SCHEMA:
                return f"schema {manifest['schema']} is not {SCHEMA}"
            for name, entry in manifest["files"].items():
                if not (folder / name).is_file():
                    return f"{name} is missing"
                if (folder / name).stat().st_size != entry["size"] or _sha256(folder / name) != entry["sha256"]:
                    return f"{name} is not as it was written"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"manifest.json cannot be read ({error})"
        return None

    def newest(self, report: Any = print) -> int | None:
        """Return the newest step that verifies; ``report`` is told why newer ones do not."""
        for step in reversed(self.steps()):
            problem = self.verify(step)
            if problem is None:
                return step
            report(f"checkpoint {self.path(step)} is skipped: {problem}")
        return None

    def restore(self, engine: Engine, step: int) -> Progress:
        """Load the checkpoint of ``step`` into a new engine and return its progress. Every rank must call it."""
        folder = self.path(step)
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "weights.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        restore_state(engine, weights, moments, state["optimizer_steps"])
        engine.loss_scale.value, engine.loss_scale.num_good_steps = state["loss_scale"]
        own = folder / f"rng-{engine.world.rank:05d}.safetensors"
        if state["world_size"] == engine.world.size and own.is_file():
            _load_random_state(own)
        return Progress(**state["progress"])

    def weights(self, step: int) -> dict[str, Tensor]:
        """Return the trained weights of a step, by name."""
        return load_file(self.path(step) / "weights.safetensors")

    def prune(self, keep_last: int, keep_step: int | None) -> None:
        """Delete all but the newest ``keep_last`` checkpoints and ``keep_step``; rank 0 alone calls it."""
        keep = {*self.steps()[-keep_last:], keep_step}
        for step in self.steps():
            if step not in keep:
                shutil.rmtree(self.path(step))

    def clean(self) -> None:
        """Delete what an interrupted save left behind; rank 0 alone calls it."""
        for path in self.folder.glob(".tmp-step-*"):
            shutil.rmtree(path)


def publish(temporary: Path, final: Path) -> None:
    """Make the finished files in ``temporary`` the checkpoint ``final``: killed at any point, it is whole or absent."""
    files = {}
    for path in sorted(temporary.iterdir()):
        _fsync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = temporary / "manifest.json"
    manifest.write_text(json.dumps({"schema": SCHEMA, "files": files}, indent=2), encoding="utf-8")
    _fsync(manifest)
    _fsync(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _fsync(final.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save_random_state(path: Path) -> None:
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = numpy.random.get_state()
    tensors["numpy"] = torch.from_numpy(keys.astype(numpy.int64))
    metadata = {"python": json.dumps(random.getstate()), "numpy": json.dumps([name, *rest])}
    save_file(tensors, path, metadata)


def _load_random_state(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        torch.set_rng_state(file.get_tensor("torch"))
        if "cuda" in file.keys() and torch.cuda.is_available():  # noqa: SIM118 (no mapping)
            torch.cuda.set_rng_state(file.get_tensor("cuda"))
        metadata = file.metadata()
        name, *rest = json.loads(metadata["numpy"])
        numpy.random.set_state((name, file.get_tensor("numpy").numpy().astype(numpy.uint32), *rest))
        version, inner, gauss = json.loads(metadata["python"])
        random.setstate((version, tuple(inner), gauss))
