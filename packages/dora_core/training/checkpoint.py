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

from dora_core.adapters.agreement import RankFailureError
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

    def how_to_go_on(self) -> str:
        """Return what to tell the user of a run that broke off."""
        steps = self.steps()
        if not steps:
            return "No checkpoint was saved yet: start again."
        return f"Start it again with --run.resume auto, and it goes on from step {max(steps)}."

    def steps(self) -> list[int]:
        """Return the steps that have a folder, oldest first, verified or not."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Return the folder of a step."""
        return self.folder / f"step-{step:08d}"

    def save(self, engine: Engine, progress: Progress, facts: dict[str, Any] | None = None) -> Path:
        """Write the checkpoint of ``progress.step``. Every rank must call it; it returns when the files are safe.

        ``facts`` is what a run that goes on from here must have in common with this one. A failure on any rank (a
        full disk) raises ``CheckpointError`` on all of them; older checkpoints stay whole.
        """
        world = engine.world
        weights, moments, count = gather_state(engine)
        final = self.path(progress.step)
        temporary = self.folder / f".tmp-{final.name}"

        def prepare() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def write() -> None:
            _save_random_state(temporary / f"rng-{world.rank:05d}.safetensors")
            if not world.is_main:
                return
            save_file(weights, temporary / "weights.safetensors")
            save_file(moments, temporary / "optimizer.safetensors")
            state = {
                "progress": progress.to_json(),
                "optimizer_steps": count,
                "loss_scale": [engine.loss_scale.value, engine.loss_scale.num_good_steps],
                "world_size": world.size,
                "facts": facts or {},
            }
            (temporary / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")

        try:
            world.on_main(prepare)
            world.agree(write)
            world.on_main(lambda: publish(temporary, final))
        except RankFailureError as error:
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"The checkpoint of step {progress.step} could not be written to {self.folder} ({error}). Older "
                "checkpoints are whole. Make room or check permissions, then resume with run.resume: auto."
            ) from None
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

    def restore(self, engine: Engine, step: int, facts: dict[str, Any] | None = None) -> Progress:
        """Load the checkpoint of ``step`` into a new engine and return its progress. Every rank must call it.

        Raises ``CheckpointError`` if ``facts`` are not those it was saved with, ``ValueError`` if it trains other
        parameters.
        """
        folder = self.path(step)
        own = folder / f"rng-{engine.world.rank:05d}.safetensors"

        def read() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return state, load_file(folder / "weights.safetensors"), load_file(folder / "optimizer.safetensors")

        state, weights, moments = engine.world.agree(read)
        for name, now in (facts or {}).items():
            before = state["facts"].get(name, now)
            if before != now:
                raise CheckpointError(
                    f"{folder} was written with {name} {before!r}; it is now {now!r}, so the run would go on with "
                    "other rows or another optimizer. Put it back, or start a new run."
                )
        restore_state(engine, weights, moments, state["optimizer_steps"])
        engine.loss_scale.value, engine.loss_scale.num_good_steps = state["loss_scale"]
        if state["world_size"] == engine.world.size and own.is_file():
            _load_random_state(own)
        return Progress(**state["progress"])

    def facts(self, step: int) -> dict[str, Any]:
        """Return the ``facts`` that the checkpoint of a step was saved with."""
        return json.loads((self.path(step) / "state.json").read_text(encoding="utf-8"))["facts"]

    def weights(self, step: int) -> dict[str, Tensor]:
        """Return the trained weights of a step, by name."""
        return load_file(self.path(step) / "weights.safetensors")

    def prune(self, keep_last: int, keep_step: int | None, step: int) -> None:
        """Delete all but the newest ``keep_last`` checkpoints up to ``step`` and ``keep_step``; for rank 0 alone."""
        keep = {*[other for other in self.steps() if other <= step][-keep_last:], keep_step}
        for other in self.steps():
            if other not in keep:
                shutil.rmtree(self.path(other))

    def drop_after(self, step: int) -> None:
        """Delete checkpoints later than ``step``, which do not verify; for rank 0 alone."""
        for other in self.steps():
            if other > step:
                shutil.rmtree(self.path(other))

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
