from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "packages" / "dora_core"
PIPELINES = sorted(path.parent.name for path in (ROOT / "pipelines").glob("*/pipeline.py"))
SOURCES = sorted(path for folder in (CORE, ROOT / "pipelines") for path in folder.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Return the modules that a file names in any import statement, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module)
    return found


def test_the_contracts_on_who_may_import_whom_are_kept():
    command = Path(sys.executable).with_name("lint-imports")
    if not command.is_file():
        pytest.skip("import-linter is not installed; the extra dev holds it")
    done = subprocess.run([command, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


def test_adapters_import_torch_safetensors_and_the_registry_only():
    files = sorted((CORE / "adapters").glob("*.py"))
    assert files
    for path in files:
        for module in imports(path):
            top = module.split(".")[0]
            assert (
                top in sys.stdlib_module_names
                or top in ("torch", "safetensors")
                or module.startswith("dora_core.adapters")
                or module == "dora_core.registry"
                or (path.name, top) == ("sharded.py", "deepspeed")
            ), f"{path} imports {module}"


def test_registry_and_configuration_import_the_standard_library_and_their_parsers_only():
    parsers = {"config.py": {"pydantic"}, "overrides.py": {"ruamel"}, "yaml_text.py": {"ruamel"}}
    for name in ("registry.py", "sections.py", "cli.py", *parsers):
        tops = {module.split(".")[0] for module in imports(CORE / name)} - {"dora_core"}
        assert tops <= sys.stdlib_module_names | parsers.get(name, set()), name


def test_there_are_pipelines():
    assert {"llm", "video", "vlm"} <= set(PIPELINES)


@pytest.mark.parametrize("name", PIPELINES)
def test_importing_a_pipelines_description_and_evaluators_loads_no_model_library(name):
    script = (
        "import importlib, sys\n"
        f"importlib.import_module('pipelines.{name}.evaluators')\n"
        "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)\n"
        f"importlib.import_module('pipelines.{name}.pipeline')\n"
        "assert not {'transformers', 'deepspeed'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_module_is_named_like_a_dependency_or_the_standard_library():
    taken = sys.stdlib_module_names | set(packages_distributions()) - {"dora_core", "pipelines"}
    assert {"torch", "datasets", "json"} <= taken
    for path in SOURCES:
        name = path.parent.name if path.stem == "__init__" else path.stem
        assert name not in taken, f"{path} is named like another module"
