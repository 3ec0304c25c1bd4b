"""Make diffusers know this package, whichever of the two is imported first, and without importing diffusers.

diffusers finds quantization methods in two tables of `diffusers.quantizers.auto`, and pipelines by the class name in
model_index.json as attributes of `diffusers`. Both are extended once those modules are imported: at once if they
already are, otherwise by a finder that waits for them. diffusers has no entry points for either, and importing it here
would take seconds; the finder answers for the names below alone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

OWN_PIPELINES = ("ClassConditionalLatentPipeline", "ClassConditionalTransformerPipeline")
"""Pipelines of `class_conditional` that model_index.json may name and diffusers lacks."""


def _add_pipelines(diffusers: ModuleType) -> None:
    """Let `diffusers.NAME` be a pipeline of ours where diffusers has none of that name (PEP 562)."""
    inner = diffusers.__dict__.get("__getattr__")

    def find(name: str) -> Any:
        if name in OWN_PIPELINES:
            from tcaq_lightning.models import class_conditional

            return getattr(class_conditional, name)
        if inner is not None:
            return inner(name)
        raise AttributeError(f"module 'diffusers' has no attribute {name!r}")

    diffusers.__dict__["__getattr__"] = find


def _add_quantizer(auto: ModuleType) -> None:
    """Enter our quantizer into the tables by `quant_method`."""
    from tcaq_lightning.artifact.diffusers_quantizer import QUANT_METHOD, TCAQConfig, TCAQQuantizer

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = TCAQConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = TCAQQuantizer


Hook = Callable[[ModuleType], None]
HOOKS: dict[str, Hook] = {"diffusers": _add_pipelines, "diffusers.quantizers.auto": _add_quantizer}
"""What is done once a module has been imported, by its name."""

FORMER_NAMES = {
    "tcaq_lightning.class_conditional": "tcaq_lightning.models.class_conditional",
    "tcaq_lightning.unets": "tcaq_lightning.models.unets",
}
"""Modules whose former names stand in the model_index.json of older artifacts."""


class _Calling(Loader):
    """A module's own loader, and a hook behind it."""

    def __init__(self, loader: Loader, hook: Hook) -> None:
        self.loader, self.hook = loader, hook

    def __getattr__(self, name: str) -> Any:
        """What else the loader can do, such as to give the source or a resource."""
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # whoever asks the module from now on finds its own
        self.loader.exec_module(module)
        self.hook(sys.modules.get(module.__name__, module))  # a lazy package puts another object in its place


class _Renamed(Loader):
    """Gives a module under its former name."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(FORMER_NAMES[module.__name__])


class _Waiting(MetaPathFinder):
    """Finds the modules of `HOOKS` where everybody else does, and has their hooks called; and renamed ones."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in FORMER_NAMES:
            return ModuleSpec(fullname, _Renamed())
        if fullname not in HOOKS:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Calling(spec.loader, HOOKS[fullname])
                return spec
        return None


def register() -> None:
    """Extend what is imported, and wait for the rest; a second call does nothing."""
    if any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        return
    for name, hook in HOOKS.items():
        if name in sys.modules:
            hook(sys.modules[name])
    sys.meta_path.insert(0, _Waiting())
