"""The layer whose bias shifts what a unit returns."""

from __future__ import annotations

from torch import nn

from tcaq_lightning.models.families import LAYERS_WITH_WEIGHTS, inner_output_layer
from tcaq_lightning.nn.layers import QuantLayer


def output_layer(unit: nn.Module, name: str) -> tuple[str, float] | None:
    """Name (within the denoiser) and inverse factor of the layer that shifts the unit's output, if there is one."""
    if isinstance(unit, (*LAYERS_WITH_WEIGHTS, QuantLayer)):
        return name, 1.0
    inner = inner_output_layer(unit)
    if inner is None:
        return None
    return f"{name}.{inner}", float(getattr(unit, "output_scale_factor", getattr(unit, "rescale_output_factor", 1.0)))
