"""PyTorch alone: integers are simulated in float32, and the bits are those that were calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tcaq_lightning.artifact.directory import OpenedArtifact
from tcaq_lightning.backends.base import BACKENDS, Backend
from tcaq_lightning.nn.layers import QuantLayer


@BACKENDS.register("torch")
class Simulation(Backend):
    """The artifact's own denoiser."""

    options = ("packed",)

    def can_run(self, layer: QuantLayer) -> str:
        """Nothing runs on integers."""
        return "simulated in float32"

    def build(self, opened: OpenedArtifact, options: Mapping[str, Any]) -> nn.Module:
        """The denoiser as it was opened."""
        return opened.denoiser
