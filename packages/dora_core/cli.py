"""The command ``dora``: list, show, prepare, train, evaluate, merge, demo. Thin: each verb imports what it needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

VERBS = {
    "list": "pipelines with their recipes and evaluators",
    "show": "a recipe as it will run, with its base and defaults filled in: dora show RECIPE [--section.field value]",
    "prepare": "write what the tiny recipe needs, made up and small: dora prepare PIPELINE FOLDER",
    "train": "train in this process: dora train PIPELINE --config RECIPE [--section.field value ...]",
    "evaluate": "score a model: dora evaluate PIPELINE --config RECIPE [--adapter FOLDER] [--output FOLDER] ...",
    "merge": "merge an adapter into a plain model: dora merge PIPELINE --adapter FOLDER --output FOLDER [--base MODEL]",
    "demo": "the whole way on a tiny model: dora demo PIPELINE [--output FOLDER]",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb. A user's mistake ends in one message and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="dora",
        description="Fine-tune models with DoRA.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {verb:<10}{text}" for verb, text in VERBS.items()),
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of: " + ", ".join(VERBS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parsed = parser.parse_args(arguments)
    from dora_core.config import exit_with_message

    try:
        {"list": _list, "show": _show}.get(parsed.verb, _pipeline_verb(parsed.verb))(parsed.arguments)
    except (ValueError, FileNotFoundError) as error:
        exit_with_message(error)


def _list(arguments: list[str]) -> None:
    import importlib.util

    from dora_core.registry import EVALUATORS, pipeline_packages

    for name, package in pipeline_packages().items():
        folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
        print(f"{name}  ({folder})")
        print("  recipes     " + ", ".join(sorted(path.stem for path in folder.glob("recipes/*.yaml"))))
        print("  evaluators  " + ", ".join(EVALUATORS.names(name)))


def _show(arguments: list[str]) -> None:
    from dora_core.config import dump_config, load_config
    from dora_core.registry import PIPELINES, unknown_name

    if not arguments:
        raise ValueError("dora show needs a recipe: a name from `dora list`, or the path of a YAML file.")
    recipe, *overrides = arguments
    pipelines = {name: PIPELINES.get(name) for name in PIPELINES.names()}
    known = {path.stem: p for p in pipelines.values() for path in sorted(p.recipes.glob("*.yaml"))}
    pipeline = known.get(recipe)
    if pipeline is None and Path(recipe).is_file():
        pipeline = next(
            (p for p in pipelines.values() if Path(recipe).resolve().is_relative_to(p.recipes.parent)), None
        )
        pipeline = pipeline or next(iter(pipelines.values()))
    if pipeline is None:
        raise unknown_name("recipe", recipe, sorted(known))
    print(dump_config(load_config(pipeline.config, recipe, overrides, recipes=pipeline.recipes)), end="")


def _pipeline_verb(verb: str):
    def run(arguments: list[str]) -> None:
        from dora_core.registry import PIPELINES

        if not arguments or arguments[0].startswith("-"):
            raise ValueError(f"dora {verb} needs a pipeline first: one of {', '.join(PIPELINES.names())}.")
        name, *rest = arguments
        action = getattr(PIPELINES.get(name), verb, None)
        if action is None:
            raise ValueError(f"Pipeline {name!r} has no {verb}.")
        action(rest)

    return run


if __name__ == "__main__":
    main(sys.argv[1:])
