"""Which classes of diffusers are denoisers, found by looking."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import diffusers
from diffusers.models import transformers, unets
from diffusers.models.modeling_utils import ModelMixin

NO_DENOISERS: dict[str, str] = {
    "MotionAdapter": "holds weights for a UNetMotionModel, and computes nothing",
    "MiniMaxMusic3RVQDepthDecoder": "decodes codes, without noise or timesteps",
}
"""Public models beside the denoisers that are none, and why."""


def denoiser_classes() -> dict[str, Any]:
    """Every public model that diffusers keeps among its UNets and transformers, by name."""
    found: dict[str, Any] = {}
    for package in (unets, transformers):
        for module in pkgutil.iter_modules(package.__path__):
            loaded = importlib.import_module(f"{package.__name__}.{module.name}")
            for name, kind in vars(loaded).items():
                own = isinstance(kind, type) and issubclass(kind, ModelMixin) and kind.__module__ == loaded.__name__
                if own and hasattr(diffusers, name) and name not in NO_DENOISERS:
                    found[name] = kind
    return dict(sorted(found.items()))
