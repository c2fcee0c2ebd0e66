"""Find pipelines, datasets, evaluators, adapters and metrics by name, without importing what is not asked for."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

ENTRY_POINT_GROUP = "dora.pipelines"

T = TypeVar("T")


class RegistryError(ValueError):
    """A name is unknown, taken twice, or not of the form that the registry expects."""


def verb(module: str) -> staticmethod:
    """Return a pipeline's verb: ``module.main`` called with the arguments, the module imported when that happens."""

    def call(arguments: Sequence[str]) -> None:
        importlib.import_module(module).main(arguments)

    return staticmethod(call)


def unknown_name(kind: str, name: str, known: list[str], what_to_do: str = "") -> RegistryError:
    """Return the error for ``name`` that is none of ``known``, with the close matches first."""
    shared = name[: max(name.rfind("."), name.rfind("/")) + 1]  # a section or an owner would make all look alike
    shared = shared if any(each.startswith(shared) for each in known) else ""
    ends = [each.removeprefix(shared) for each in known if each.startswith(shared)]
    close = [shared + end for end in difflib.get_close_matches(name.removeprefix(shared), ends, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return RegistryError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}.{what_to_do}")


def pipeline_packages() -> dict[str, str]:
    """Map each pipeline's name to its package: subfolders of ``pipelines`` first, then installed entry points.

    Nothing is imported but the (empty) package ``pipelines`` itself.
    """
    found: dict[str, str] = {}
    spec = importlib.util.find_spec("pipelines")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(root).glob("*/pipeline.py")):
            found.setdefault(file.parent.name, f"pipelines.{file.parent.name}")
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        held = found.setdefault(entry.name, entry.value)
        if held != entry.value:
            raise RegistryError(
                f"Two pipelines are called {entry.name!r}: {held} and {entry.value} (an entry point of "
                f"{entry.dist.name if entry.dist else 'an unknown distribution'}). Rename or uninstall one of them."
            )
    return found


class Registry:
    """Names to objects, filled by decorators in the modules that own them.

    A name is ``<owner>/<name>`` when ``module`` is given: the owner is a pipeline and its module ``module`` is
    imported the first time one of its names is asked for. Without ``module`` names are flat and live in
    ``home``, imported likewise.
    """

    def __init__(self, kind: str, *, module: str | None = None, home: str | None = None) -> None:
        self.kind = kind
        self._module = module
        self._home = home
        self._objects: dict[str, Any] = {}
        self._origins: dict[str, str] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a function or class so that ``get(name)`` returns it; a name taken twice is an error."""
        origin = _caller_location()
        if self._module and name.count("/") != 1:
            raise RegistryError(f"{self.kind} name {name!r} (at {origin}) must read '<pipeline>/<name>'.")
        if name in self._objects:
            raise RegistryError(
                f"{self.kind} {name!r} is registered twice: at {self._origins[name]} and at {origin}. Rename one."
            )

        def store(obj: T) -> T:
            self._objects[name] = obj
            self._origins[name] = origin
            return obj

        return store

    def get(self, name: str) -> Any:
        """Return the object called ``name``, importing its owner's module if needed."""
        if name not in self._objects:
            if self._module and name.count("/") == 1:
                self._import_owner(name.split("/")[0])
            elif not self._module:
                self._import_home()
        if name not in self._objects:
            raise unknown_name(self.kind, name, self.names())
        return self._objects[name]

    def names(self, owner: str | None = None) -> list[str]:
        """Return all names, or those of one owner, sorted; imports the modules that declare them."""
        if self._module:
            for package in [owner] if owner else pipeline_packages():
                self._import_owner(package)
        else:
            self._import_home()
        return sorted(name for name in self._objects if owner is None or name.startswith(owner + "/"))

    def origin(self, name: str) -> str:
        """Return ``file:line`` of the registration of ``name``."""
        self.get(name)
        return self._origins[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _import_owner(self, owner: str) -> None:
        packages = pipeline_packages()
        if owner not in packages:
            raise unknown_name("pipeline", owner, sorted(packages))
        if _has_module(owner, packages[owner], self._module):
            importlib.import_module(f"{packages[owner]}.{self._module}")

    def _import_home(self) -> None:
        if self._home:
            importlib.import_module(self._home)


def _has_module(pipeline: str, package: str, module: str) -> bool:
    """Say whether a pipeline's package has a module, without importing it."""
    try:
        return importlib.util.find_spec(f"{package}.{module}") is not None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{package}.".startswith(f"{error.name}."):
            raise  # the package is there, and something that it imports is not
        raise RegistryError(
            f"Pipeline {pipeline!r} is said to be the package {package!r}, which is not installed. Install it, or "
            "uninstall the distribution whose entry point names it."
        ) from None


def _caller_location() -> str:
    frame = inspect.currentframe().f_back.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class PipelineRegistry(Registry):
    """The registry of pipelines: a name is a folder, and ``get`` imports ``<folder>/pipeline.py``."""

    def get(self, name: str) -> Any:
        """Return the pipeline called ``name``; an error says what its folder lacks."""
        if name not in self._objects:
            packages = pipeline_packages()
            if name not in packages:
                raise unknown_name(
                    self.kind, name, sorted(packages), " A pipeline is a folder pipelines/<name>/ with a pipeline.py."
                )
            if not _has_module(name, packages[name], "pipeline"):
                raise RegistryError(
                    f"Pipeline {name!r} has no module {packages[name]}.pipeline. Add the file pipeline.py, with "
                    f"@PIPELINES.register({name!r}) on what it offers."
                )
            importlib.import_module(f"{packages[name]}.pipeline")
            if name not in self._objects:
                raise RegistryError(
                    f"{packages[name]}.pipeline registers no pipeline {name!r}. Decorate its class with "
                    f"@PIPELINES.register({name!r}): the name and the folder's or entry point's name must agree."
                )
        return self._objects[name]

    def names(self, owner: str | None = None) -> list[str]:
        """Return the names of the pipelines found, sorted; imports none of them."""
        return sorted(set(pipeline_packages()) | set(self._objects))


PIPELINES = PipelineRegistry("pipeline")
DATASETS = Registry("dataset", module="data")
EVALUATORS = Registry("evaluator", module="evaluators")
ADAPTERS = Registry("adapter kind", home="dora_core.adapters.kinds")
METRICS = Registry("metric", home="dora_core.evaluation.metrics")
