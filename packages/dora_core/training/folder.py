"""Open a run's folder: one process tree at a time, shared by all nodes, with what the run depends on written down."""

from __future__ import annotations

import fcntl
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from dora_core.config import ConfigError, dump_config, read_yaml
from dora_core.engine.distributed import World
from dora_core.training.checkpoint import CheckpointStore
from dora_core.training.environment import describe_environment
from dora_core.training.metrics import MetricLog


def open_run_folder(
    config: Any, world: World, checkpoints: CheckpointStore, say: Callable[[str], None]
) -> tuple[MetricLog | None, TextIO | None]:
    """Make ``run.root/run.name`` ready and return its log and its lock, on rank 0. Every rank must call it.

    Raises ``ValueError`` on every rank if the folder is in use, holds checkpoints that ``run.resume`` does not allow,
    or is not the same on all nodes.
    """
    folder = checkpoints.folder.parent
    token = world.broadcast(str(uuid.uuid4()))

    def open_it() -> tuple[MetricLog, TextIO]:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder, "set another run.name")
        _prepare(config, folder, checkpoints, say)
        environment = json.dumps(describe_environment(world.size), indent=2)
        (folder / "environment.json").write_text(environment + "\n", encoding="utf-8")
        (folder / "run.token").write_text(token, encoding="utf-8")
        return MetricLog(folder, config.log, config.run.name), lock

    def look() -> None:
        file = folder / "run.token"
        if not file.is_file() or file.read_text(encoding="utf-8") != token:
            raise ConfigError(f"{folder.absolute()} is not the same on every node. Set run.root to a shared folder.")

    opened = world.on_main(open_it)
    world.agree(look)
    return opened or (None, None)


def lock_folder(folder: Path, instead: str) -> TextIO:
    """Keep other processes out of a folder until the returned file is closed or this process ends.

    Raises ``ConfigError`` if it is in use, with what to do ``instead`` of waiting.
    """
    lock = (folder / "run.lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f"{folder} is in use by another process. Wait for it, or {instead}.") from None
    return lock


def _prepare(config: Any, folder: Path, checkpoints: CheckpointStore, say: Callable[[str], None]) -> None:
    begins = config.run.resume == "never"
    if begins and checkpoints.steps():
        raise ConfigError(
            f"{folder} already holds checkpoints (last step {checkpoints.steps()[-1]}). Set run.resume: auto to go on, "
            "or another run.name to start anew."
        )
    if begins:
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    checkpoints.clean()
    path = folder / "config.yaml"
    before = read_yaml(path) if path.is_file() and not begins else {}
    path.write_text(dump_config(config), encoding="utf-8")
    for section, values in read_yaml(path).items() if before else ():
        for key, value in values.items():
            old = before.get(section, {}).get(key)
            if old != value and (section, key) != ("run", "resume"):
                say(f"note: {section}.{key} was {old!r} and is now {value!r}")
