from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import diffusers
import pytest

from tcaq_lightning.artifact import registration
from tcaq_lightning.models import class_conditional, pipelines


def run(code: str) -> None:
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


KNOWN = """
from diffusers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["tcaq"].__name__ == "TCAQQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["tcaq"].__name__ == "TCAQConfig"
assert vars(diffusers)["__getattr__"].__module__ == "tcaq_lightning.artifact.registration"
assert not hasattr(diffusers, "NoSuchPipeline")
"""


def test_this_package_first() -> None:
    run(
        "import sys, importlib.util, tcaq_lightning\n"
        "assert not {'torch', 'diffusers'} & sys.modules.keys()\n"
        "assert importlib.util.find_spec('diffusers').name == 'diffusers'\n"  # to ask is not to import
        "import diffusers\n"
        "assert type(diffusers.__spec__.loader).__module__ != 'tcaq_lightning.artifact.registration'" + KNOWN
    )


HARMLESS = """
import sys
finders, hooks, modules = list(sys.meta_path), list(sys.path_hooks), set(sys.modules)
import tcaq_lightning
assert sys.meta_path[1:] == finders  # one more, and those of before in their order
assert sys.path_hooks == hooks
assert not {name for name in set(sys.modules) - modules if name.split(".")[0] in ("torch", "diffusers")}
"""


def test_the_import_system_stays_as_it_was_but_for_one_finder() -> None:
    run(HARMLESS)


def test_other_imports_are_left_to_the_other_finders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Counting(importlib.abc.MetaPathFinder):
        asked: ClassVar[list[str]] = []

        def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
            self.asked.append(fullname)

    (tmp_path / "toy_other.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    waiting = next(f for f in sys.meta_path if isinstance(f, registration._Waiting))
    others = [f for f in sys.meta_path if f is not waiting]
    monkeypatch.setattr(sys, "meta_path", [waiting, Counting(), *others])
    module = importlib.import_module("toy_other")
    monkeypatch.delitem(sys.modules, "toy_other")
    assert Counting.asked == ["toy_other"]  # once: the one that waits asks nobody about it
    assert type(module.__spec__.loader) is SourceFileLoader  # type: ignore[union-attr]


@pytest.mark.slow
def test_without_the_finder_diffusers_imported_later_knows_nothing_of_us() -> None:
    run(
        "import sys, tcaq_lightning\n"
        "sys.meta_path.pop(0)\n"
        "import diffusers\nfrom diffusers.quantizers import auto\n"
        "assert 'tcaq' not in auto.AUTO_QUANTIZER_MAPPING\n"
        "assert not hasattr(diffusers, 'ClassConditionalLatentPipeline')\n"
    )


@pytest.mark.slow
def test_diffusers_first() -> None:
    run("import diffusers\nfrom diffusers.quantizers import auto\nimport tcaq_lightning" + KNOWN)


def test_hooks_are_called_when_a_module_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "toy_lazy.py").write_text(
        "import sys, types\nvalue = 1\nsys.modules[__name__] = other = types.ModuleType(__name__)\n"
        "other.__spec__, other.value = __spec__, 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[ModuleType] = []
    monkeypatch.setitem(registration.HOOKS, "toy_lazy", seen.append)
    assert importlib.util.find_spec("toy_lazy") is not None  # to ask is not to import
    assert not seen
    module = importlib.import_module("toy_lazy")
    importlib.import_module("toy_lazy")
    assert seen == [module]
    assert module.value == 2
    assert isinstance(module.__spec__.loader, SourceFileLoader)
    monkeypatch.delitem(sys.modules, "toy_lazy")
    monkeypatch.setitem(registration.HOOKS, "toy_missing", seen.append)
    with pytest.raises(ModuleNotFoundError, match="toy_missing"):
        importlib.import_module("toy_missing")


def test_hooks_are_called_at_once_where_a_module_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ModuleType] = []
    waiting = next(f for f in sys.meta_path if isinstance(f, registration._Waiting))
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if f is not waiting])
    monkeypatch.setattr(registration, "HOOKS", {"json": seen.append})
    registration.register()
    assert seen == [json]
    registration.register()
    assert len(seen) == 1


def test_a_waiting_loader_can_what_its_own_can() -> None:
    loader: Any = registration._Calling(SourceFileLoader("name", __file__), lambda _: None)
    assert loader.get_filename("name") == __file__
    assert b"a_waiting_loader" in loader.get_data(__file__)
    with pytest.raises(AttributeError):
        _ = loader.no_such_attribute


def test_registers_once() -> None:
    before = list(sys.meta_path)
    registration.register()
    assert sys.meta_path == before


def test_pipelines_of_the_package_are_attributes_of_diffusers() -> None:
    assert set(registration.OWN_PIPELINES) == set(pipelines.OWN_PIPELINES)
    for name in registration.OWN_PIPELINES:
        assert getattr(diffusers, name) is getattr(class_conditional, name)
    with pytest.raises(AttributeError, match="NoSuchPipeline"):
        _ = diffusers.NoSuchPipeline


@pytest.mark.parametrize(("former", "present"), registration.FORMER_NAMES.items())
def test_former_names_of_older_artifacts(former: str, present: str) -> None:
    module = importlib.import_module(present)
    spec = module.__spec__
    assert importlib.import_module(former) is module
    assert module.__spec__ is spec
