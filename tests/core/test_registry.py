from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import pipelines
from dora_core import registry
from dora_core.registry import ADAPTERS, EVALUATORS, METRICS, PIPELINES, Registry, RegistryError, pipeline_packages


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a package, and optionally an entry point that names it, into a search path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(PIPELINES, "_objects", dict(PIPELINES._objects))
    monkeypatch.setattr(EVALUATORS, "_objects", dict(EVALUATORS._objects))
    before = set(sys.modules)

    def write(package: str, modules: dict[str, str], entry_point: str | None = None) -> Path:
        folder = tmp_path.joinpath(*package.split("."))
        folder.mkdir(parents=True)
        for name, text in {"__init__": "", **modules}.items():
            (folder / f"{name}.py").write_text(text)
        if entry_point:
            metadata = tmp_path / f"dist_{package}-1.0.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{package}\nVersion: 1.0\n")
            (metadata / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\n{entry_point} = {package}\n")
        return folder

    yield write
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {path.name for path in tmp_path.iterdir()}:
            del sys.modules[name]


PIPELINE_MODULE = """
from dora_core.registry import PIPELINES

@PIPELINES.register("{name}")
class Pipeline:
    pass
"""
EVALUATOR_MODULE = """
from dora_core.registry import EVALUATORS

@EVALUATORS.register("{name}")
def evaluator():
    pass
"""


def test_what_is_registered_can_be_got_listed_and_located():
    things = Registry("thing")

    @things.register("one")
    def one() -> int:
        return 1

    @things.register("another")
    class Another:
        pass

    assert things.get("one") is one
    assert things.names() == list(things) == ["another", "one"]
    file, _, line = things.origin("one").rpartition(":")
    assert Path(file).samefile(__file__)
    assert "one" in Path(file).read_text().splitlines()[int(line) - 1]


def test_a_name_taken_twice_is_an_error_that_says_who_holds_it():
    things = Registry("thing")
    things.register("one")(object())
    held = things.origin("one")
    with pytest.raises(RegistryError, match="thing 'one' is registered twice") as caught:
        things.register("one")
    assert held in str(caught.value)
    assert str(caught.value).count(__file__) == 2


def test_an_unknown_name_is_an_error_with_close_matches():
    with pytest.raises(RegistryError, match=r"Unknown evaluator 'llm/bolq'\. Did you mean llm/boolq\?"):
        EVALUATORS.get("llm/bolq")
    with pytest.raises(RegistryError, match=r"Unknown evaluator 'boolq'\. Did you mean llm/boolq"):
        EVALUATORS.get("boolq")
    with pytest.raises(RegistryError, match=r"Unknown adapter kind 'dor'\. Did you mean dora"):
        ADAPTERS.get("dor")
    with pytest.raises(RegistryError, match=r"Unknown thing 'x'\. Known: none\."):
        Registry("thing").get("x")


def test_close_matches_compare_what_differs_and_not_the_shared_prefix():
    message = str(registry.unknown_name("key", "section.alpah", ["section.alpha", "section.beta", "section.gamma"]))
    assert "Did you mean section.alpha?" in message


def test_a_name_without_its_pipeline_is_refused_where_it_is_registered():
    with pytest.raises(RegistryError, match=r"evaluator name 'boolq' \(at .*test_registry.py:\d+\) must read"):
        EVALUATORS.register("boolq")


def test_the_registries_find_what_their_own_modules_declare():
    assert {"dora", "lora", "full", "none"} <= set(ADAPTERS.names())
    assert METRICS.names()
    assert "llm" in PIPELINES.names()
    assert EVALUATORS.names("llm") and all(name.startswith("llm/") for name in EVALUATORS.names("llm"))
    assert Path(EVALUATORS.origin("llm/boolq").rpartition(":")[0]).name == "evaluators.py"


def test_pipelines_are_discovered_without_importing_them():
    script = (
        "import sys; from dora_core.registry import PIPELINES; assert 'llm' in PIPELINES.names(); "
        "print([name for name in sys.modules if name.startswith('pipelines.') or name in ('torch', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_folders_of_this_checkout_are_pipelines_if_they_hold_a_pipeline_module():
    [root] = pipelines.__path__
    folders = {path.parent.name for path in Path(root).glob("*/pipeline.py")}
    assert folders and folders <= set(pipeline_packages())
    assert pipeline_packages()["llm"] == "pipelines.llm"


def test_an_installed_distribution_adds_a_pipeline_through_its_entry_point(install):
    modules = {
        "pipeline": PIPELINE_MODULE.format(name="speech"),
        "evaluators": EVALUATOR_MODULE.format(name="speech/words"),
    }
    install("speech_package", modules, entry_point="speech")
    assert pipeline_packages()["speech"] == "speech_package"
    assert {"llm", "speech"} <= set(PIPELINES.names())
    assert "speech_package" not in sys.modules
    assert PIPELINES.get("speech").__module__ == "speech_package.pipeline"
    assert EVALUATORS.names("speech") == ["speech/words"]
    assert EVALUATORS.get("speech/words").__name__ == "evaluator"


def test_a_folder_and_an_entry_point_of_one_name_are_refused(install):
    install("other_llm", {"pipeline": PIPELINE_MODULE.format(name="llm")}, entry_point="llm")
    with pytest.raises(RegistryError, match=r"Two pipelines are called 'llm': pipelines\.llm and other_llm") as caught:
        pipeline_packages()
    assert "dist-other_llm" in str(caught.value)


def test_an_unknown_pipeline_says_where_pipelines_live():
    with pytest.raises(RegistryError, match=r"Unknown pipeline 'lm'\. Did you mean vlm or llm\?.*pipelines/<name>/"):
        PIPELINES.get("lm")
    with pytest.raises(RegistryError, match=r"Unknown pipeline 'lm'\. Did you mean vlm or llm\?"):
        EVALUATORS.get("lm/boolq")


def test_a_pipeline_without_evaluators_has_none(install):
    install("silent_package", {"pipeline": PIPELINE_MODULE.format(name="silent")}, entry_point="silent")
    assert EVALUATORS.names("silent") == []
    with pytest.raises(RegistryError, match="Unknown evaluator 'silent/words'"):
        EVALUATORS.get("silent/words")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, r"has no module halfway_package\.pipeline\. Add the file"),
        (
            {"pipeline": PIPELINE_MODULE.format(name="other")},
            r"halfway_package\.pipeline registers no pipeline 'halfway'",
        ),
    ],
)
def test_an_entry_point_of_an_incomplete_package_says_what_it_lacks(install, modules, message):
    install("halfway_package", modules, entry_point="halfway")
    with pytest.raises(RegistryError, match=message):
        PIPELINES.get("halfway")


def test_an_entry_point_of_a_package_that_is_not_installed_is_named(install, tmp_path):
    install("gone_package", {}, entry_point="gone")
    (tmp_path / "gone_package" / "__init__.py").unlink()
    (tmp_path / "gone_package").rmdir()
    for ask in (lambda: PIPELINES.get("gone"), lambda: EVALUATORS.names("gone")):
        with pytest.raises(RegistryError, match="package 'gone_package', which is not installed"):
            ask()


def test_a_missing_dependency_of_a_pipeline_is_not_hidden(install):
    install("needy_package", {"pipeline": "import no_such_dependency\n"}, entry_point="needy")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        PIPELINES.get("needy")
    install("needier_package", {"__init__": "import no_such_dependency\n"}, entry_point="needier")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        PIPELINES.get("needier")


def test_objects_of_any_kind_may_be_registered():
    things = Registry("thing")
    thing = SimpleNamespace(value=3)
    assert things.register("one")(thing) is thing
    assert things.get("one").value == 3
