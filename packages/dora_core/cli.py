"""The command ``dora``, whose verbs are below. Thin: each imports what it needs."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

VERBS = {
    "list": "pipelines with their recipes and evaluators",
    "show": "a recipe with its base and defaults filled in: dora show [PIPELINE] RECIPE [--section.field value]",
    "prepare": "write what the tiny recipe needs, made up and small: dora prepare PIPELINE FOLDER",
    "train": "train in this process: dora train PIPELINE --config RECIPE [--section.field value ...]",
    "sweep": "train and score a grid: dora sweep [PIPELINE] RECIPE --adapter.rank 4,8 --run.seed 0,1,2 ...",
    "evaluate": "score a model: dora evaluate PIPELINE --config RECIPE [--adapter FOLDER] [--output FOLDER] ...",
    "merge": "merge an adapter into a plain model: dora merge PIPELINE --adapter FOLDER --output FOLDER [--base MODEL]",
    "analyze": "how training changed magnitudes and directions: dora analyze BASE RUN ... | --study PIPELINE",
    "nightly": "the regression evaluation: dora nightly [--only PIPELINE[/ENTRY]] [--output FOLDER] [--propose] ...",
    "demo": "the whole way on a tiny model: dora demo PIPELINE [--output FOLDER], or dora demo all",
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
        own = {"list": _list, "show": _show, "sweep": _sweep, "analyze": _analyze, "nightly": _nightly}
        own.get(parsed.verb, _pipeline_verb(parsed.verb))(parsed.arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("DORA_TRACEBACK"):
            raise
        exit_with_message(error)


def _list(arguments: list[str]) -> None:
    from dora_core.registry import EVALUATORS, pipeline_packages

    if arguments:
        raise ValueError(f"dora list takes no arguments; it was given {' '.join(arguments)}. Leave them out.")
    for name, package in pipeline_packages().items():
        evaluators = EVALUATORS.names(name)  # before the folder: it says what is wrong with a broken pipeline
        folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
        print(f"{name}  ({folder})")
        print("  recipes     " + ", ".join(sorted(path.stem for path in folder.glob("recipes/*.yaml"))))
        print("  evaluators  " + ", ".join(evaluators))


def _show(arguments: list[str]) -> None:
    from dora_core.config import dump_config, load_config
    from dora_core.registry import PIPELINES

    owner, recipe, overrides = _split_recipe("show", arguments)
    pipeline = PIPELINES.get(owner)
    print(dump_config(load_config(pipeline.config, recipe, overrides, recipes=pipeline.recipes)), end="")


def _sweep(arguments: list[str]) -> None:
    from dora_core.registry import verb

    if not {"-h", "--help"} & set(arguments):
        owner, recipe, rest = _split_recipe("sweep", arguments)
        arguments = [owner, recipe, *rest]
    verb("dora_core.sweep.command")(arguments)


def _split_recipe(verb: str, arguments: Sequence[str]) -> tuple[str, str, list[str]]:
    """Split ``[PIPELINE] RECIPE ...`` into the pipeline's name, the recipe and the rest."""
    from dora_core.registry import PIPELINES

    words, owner = list(arguments), None
    if len(words) > 1 and words[0] in PIPELINES.names() and not words[1].startswith("--"):
        owner = words.pop(0)
    if not words or words[0].startswith("--"):
        raise ValueError(f"dora {verb} needs a recipe: a name from `dora list`, or the path of a YAML file.")
    recipe, *rest = words
    return owner or _owner_of_recipe(verb, recipe), recipe, rest


def _owner_of_recipe(verb: str, recipe: str) -> str:
    """Return the one pipeline that a recipe, given by name or by path, can belong to."""
    from dora_core.registry import PIPELINES, unknown_name

    folders = {name: PIPELINES.get(name).recipes for name in PIPELINES.names()}
    path = Path(recipe)
    if path.is_file():
        owners = [name for name, folder in folders.items() if path.resolve().is_relative_to(folder.parent.resolve())]
        owners = owners or list(folders)
    else:
        owners = [name for name, folder in folders.items() if (folder / f"{recipe}.yaml").is_file()]
    if not owners:
        known = {path.stem for folder in folders.values() for path in folder.glob("*.yaml")}
        raise unknown_name("recipe", recipe, sorted(known), " Give one of these names or the path of a YAML file.")
    if len(owners) > 1:
        raise ValueError(
            f"Recipe {recipe!r} can be of {' or '.join(owners)}. Say which: dora {verb} {owners[0]} {recipe}."
        )
    return owners[0]


def _analyze(arguments: list[str]) -> None:
    if arguments[:1] == ["--study"]:
        _pipeline_verb("study", "analyze --study")(arguments[1:])
    else:
        importlib.import_module("dora_core.analysis.command").main(arguments)


def _nightly(arguments: list[str]) -> None:
    importlib.import_module("dora_core.nightly.command").main(arguments)


def _pipeline_verb(verb: str, words: str | None = None) -> Callable[[list[str]], None]:
    def run(arguments: list[str]) -> None:
        from dora_core.registry import PIPELINES

        if not arguments or arguments[0].startswith("-"):
            raise ValueError(f"dora {words or verb} needs a pipeline first: one of {', '.join(PIPELINES.names())}.")
        name, *rest = arguments
        if (verb, name) == ("demo", "all"):
            if rest:
                raise ValueError("dora demo all takes no further arguments. Run one pipeline's demo to give it some.")
            without = [each for each in PIPELINES.names() if not hasattr(PIPELINES.get(each), verb)]
            if without:
                print(f"without a demo: {', '.join(without)}")
            for each in PIPELINES.names():
                if each not in without:
                    _action(each, verb)([])
        else:
            _action(name, verb)(rest)

    return run


def _action(name: str, verb: str) -> Callable[[list[str]], None]:
    from dora_core.registry import PIPELINES

    action = getattr(PIPELINES.get(name), verb, None)
    if action is None:
        raise ValueError(f"Pipeline {name!r} has no {verb}. Add it to its pipeline.py, or use another verb.")
    return action


if __name__ == "__main__":
    main(sys.argv[1:])
