"""What a diffusers directory holds beside its weights: pipeline, components, their configs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import ASSETS
from tcaq_lightning.runtime.json_files import read_json
from tcaq_lightning.zoo.conversion.checkpoint import State, listing

ARCHITECTURES = ASSETS / "architectures"
INDEX = "model_index.json"
CONFIG_NAMES = ("config.json", "scheduler_config.json")
TRANSFORMERS_KEYS = ("architectures", "model_type")
"""What transformers writes beside a model's settings: its class."""


@dataclass(frozen=True)
class Component:
    """A component of a pipeline.

    Attributes:
        library: module that has the class, such as `diffusers`.
        name: of the class.
        config: its settings.
    """

    library: str
    name: str
    config: dict[str, Any]

    def load_class(self) -> Any:
        """The class."""
        return getattr(importlib.import_module(self.library), self.name)

    def build(self) -> Any:
        """The network; its parameters are on the meta device, but for a text encoder's.

        Raises:
            UserError: the class refuses the config.
        """
        cls = self.load_class()
        try:
            if self.library == "transformers":  # has buffers that no checkpoint holds
                return cls(cls.config_class(**self.config))
            with torch.device("meta"):
                return cls.from_config(self.config)
        except (ValueError, TypeError, RuntimeError, NotImplementedError, ZeroDivisionError) as error:
            raise UserError(f"{self.name} does not take this config: {' '.join(str(error).split())[:300]}") from error

    def build_scheduler(self) -> Any:
        """The scheduler, with real tensors."""
        return self.load_class().from_config(self.config)


@dataclass(frozen=True)
class Architecture:
    """A pipeline's class and its components; those that the pipeline takes but has not are None."""

    pipeline: str
    components: dict[str, Component | None]

    def __getitem__(self, name: str) -> Component:
        component = self.components[name]
        assert component is not None
        return component

    @property
    def first_stage(self) -> str | None:
        """Name of the component that decodes latents."""
        return next((name for name in ("vqvae", "vae") if name in self.components), None)

    def replacing(self, **components: Component | None) -> Architecture:
        """The same with other components."""
        return Architecture(self.pipeline, self.components | components)


def names() -> list[str]:
    """Names of the shipped architectures."""
    return sorted(p.name for p in ARCHITECTURES.iterdir() if (p / INDEX).is_file())


def read_architecture(directory: Path) -> Architecture:
    """Architecture of a directory in diffusers layout, whose weights may be missing."""
    index = read_json(directory / INDEX)
    components: dict[str, Component | None] = {}
    for name, entry in index.items():
        if not isinstance(entry, list):
            continue
        library, class_name = entry
        file = next((f for n in CONFIG_NAMES if (f := directory / name / n).is_file()), None)
        if class_name is None or file is None:
            components[name] = None
            continue
        config = read_json(file)
        settings = {k: v for k, v in config.items() if not k.startswith("_") and k not in TRANSFORMERS_KEYS}
        components[name] = Component(str(library), str(class_name), settings)
    return Architecture(str(index["_class_name"]), components)


def _alone(value: Tensor) -> Tensor:
    """A weight with memory of its own, as safetensors files want it; parts of a fused weight share theirs."""
    shared = value.untyped_storage().nbytes() != value.nbytes
    return value.clone() if shared or not value.is_contiguous() else value


def load_exactly(module: nn.Module, converted: State, name: str) -> nn.Module:
    """Give a network on the meta device its weights, which must be exactly those that it has.

    Args:
        module: the network.
        converted: weights under the network's names.
        name: of the component, for errors.

    Raises:
        UserError: weights are missing, superfluous, of other shapes, NaN or infinite.
    """
    expected = module.state_dict()
    problems = []
    if missing := [k for k in expected if k not in converted]:
        problems.append(f"missing {listing(missing)}")
    if extra := [k for k in converted if k not in expected]:
        problems.append(f"without a place {listing(extra)}")
    shapes = [
        f"{k} {tuple(converted[k].shape)} not {tuple(v.shape)}"
        for k, v in expected.items()
        if k in converted and v.shape != converted[k].shape
    ]
    if shapes:
        problems.append(f"of another shape {listing(shapes)}")
    if problems:
        raise UserError(
            f"{name}: the checkpoint does not fit a {type(module).__name__} of this config; weights "
            f"{'; '.join(problems)}; give the config of this checkpoint (--architecture)"
        )
    broken = [k for k, v in converted.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise UserError(f"{name}: expected finite weights, got NaN or infinity in {listing(broken)}")
    module.load_state_dict({k: _alone(v) for k, v in converted.items()}, assign=True)
    return module.requires_grad_(False).eval()
