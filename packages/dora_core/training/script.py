"""How a training script ends: a user's mistake in one message, a failure without waiting for other ranks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from dora_core.config import exit_with_message, load_config, split_arguments

C = TypeVar("C")

EXIT_STOPPED = 75
"""Exit status of a run that was told to stop, saved and can be resumed (EX_TEMPFAIL)."""


def run_training(
    train: Callable[[C], None], config_class: type[C], recipes: Path, arguments: Sequence[str] | None = None
) -> None:
    """Be the main function of a training script: read recipe and overrides (``sys.argv`` if not given) and train."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        print(sys.modules[train.__module__].__doc__)
        print(f"Recipes: {', '.join(sorted(path.stem for path in recipes.glob('*.yaml')))}, or a YAML file.")
        print("`dora show RECIPE` prints every field that can be set.")
        return

    def main() -> None:
        recipe, overrides = split_arguments(words)
        train(load_config(config_class, recipe, overrides, recipes=recipes))

    run_script(main)


def run_script(main: Callable[[], None]) -> None:
    """Run a training script: a user's mistake ends in one message and exit status 2, on however many ranks."""
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("DORA_TRACEBACK"):
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # rank 0 mostly says the same first, and the launcher then ends this process
        exit_with_message(error)
    # Only after success: after a failure others may be waiting in a collective, and leaving the group waits for them.
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
