"""A backend of one's own: the artifact's integer weights, with the inputs of some layers in full precision.

It shows what quantized activations cost, and by a pattern which layers' cost most.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from torch import nn

from tcaq_lightning.artifact.directory import OpenedArtifact
from tcaq_lightning.backends.base import BACKENDS, Backend
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.parts import quant_layers


@BACKENDS.register("weight_only")
class WeightOnly(Backend):
    """PyTorch's simulation without the quantizers of layers' inputs."""

    options = ("layers",)

    def can_run(self, layer: QuantLayer) -> str:
        """Why a layer's product is not one of integers."""
        return "its input stays in full precision"

    def build(self, opened: OpenedArtifact, options: Mapping[str, Any]) -> nn.Module:
        """The denoiser that stands in the pipeline; `layers` is a pattern of names."""
        for name, layer in quant_layers(opened.denoiser).items():
            if fnmatch(name, options.get("layers", "*")):
                layer.input_quantizer.enabled = False
        return opened.denoiser
