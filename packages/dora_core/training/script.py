"""The main functions of a pipeline's verbs, and how they end: a user's mistake in one message, a failure at once."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from dora_core.adapters.stored import named_base
from dora_core.config import exit_with_message, load_config, require, split_arguments
from dora_core.engine.distributed import World
from dora_core.engine.peers import LostRankError

C = TypeVar("C")


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


def run_evaluation(
    pipeline: str,
    config_class: type[C],
    recipes: Path,
    evaluate: Callable[[C, World, Path | None, Path], None],
    arguments: Sequence[str],
) -> None:
    """Be the main function of ``dora evaluate``: call ``evaluate(config, world, adapter or None, output)``.

    Started by a launcher on several ranks, each holds the model and scores its share of the rows.
    """
    parser = argparse.ArgumentParser(prog=f"dora evaluate {pipeline}", allow_abbrev=False)
    parser.add_argument("--adapter", type=Path, help="folder of an adapter that training wrote")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results and predictions")
    own, rest = parser.parse_known_args(arguments)
    recipe, overrides = split_arguments(rest)

    def main() -> None:
        config = load_config(config_class, recipe, overrides, recipes=recipes)
        evaluate(config, World.start(config.deepspeed.timeout_s), own.adapter, own.output)

    run_script(main)


def run_merge(
    pipeline: str,
    merge: Callable[[Path, Path, str, str], None],
    arguments: Sequence[str],
    *,
    precision: str = "bf16",
) -> None:
    """Be the main function of ``dora merge``: call ``merge(adapter, output, base, precision)``."""
    parser = argparse.ArgumentParser(prog=f"dora merge {pipeline}", allow_abbrev=False)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of an adapter in PEFT's layout")
    parser.add_argument("--output", type=Path, required=True, help="folder for the merged model")
    parser.add_argument("--base", help="base model; what adapter_config.json names if not given")
    parser.add_argument(
        "--precision", choices=("bf16", "fp16", "fp32"), default=precision, help="type of the merged weights"
    )
    own = parser.parse_args(arguments)

    def main() -> None:
        base = own.base or named_base(own.adapter)
        change = "Pass --base MODEL."
        require(bool(base), "--base", base, "given where adapter_config.json names no base model", change)
        merge(own.adapter, own.output, base, own.precision)

    run_script(main)


def run_script(main: Callable[[], None]) -> None:
    """Run a training script: a user's mistake ends in one message and exit status 2, on however many ranks.

    A rank that was killed ends in one message too, and in exit status 1.
    """
    try:
        main()
    except LostRankError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)  # clear of another rank's progress bar
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        if os.environ.get("DORA_TRACEBACK"):
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # rank 0 mostly says the same first, and the launcher then ends this process
        exit_with_message(error)
    # Only after success: after a failure others may be waiting in a collective, and leaving the group waits for them.
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
