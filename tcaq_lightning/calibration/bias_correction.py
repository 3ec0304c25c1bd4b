"""Bias correction: the mean error of a unit's output channels, taken into the bias of its last quantized layer.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2, here by
timestep group (docs/method.md, "Units and order").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tcaq_lightning.models.unit_outputs import channel_means
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.output_layers import output_layer
from tcaq_lightning.nn.parts import quant_layers


class ShiftedLayer(NamedTuple):
    """The quantized layer whose bias shifts a unit's output.

    Attributes:
        layer: that layer.
        factor: from a shift of the unit's output to the shift of the layer's.
    """

    layer: QuantLayer
    factor: float


def shifted_layer(unit: nn.Module, name: str, quantized: nn.Module) -> ShiftedLayer | None:
    """Find the layer whose bias shifts a unit's output; None if there is none that is quantized.

    Args:
        unit: quantized unit.
        name: of the unit.
        quantized: the denoiser that it belongs to.
    """
    found = output_layer(unit, name)
    if found is None:
        return None
    layer = quant_layers(quantized).get(found[0])
    return None if layer is None or layer.bias_shift is None else ShiftedLayer(layer, found[1])


@torch.no_grad()
def correct_bias(shifted: ShiftedLayer, errors: Tensor) -> None:
    """Shift a unit's output channels by their mean error.

    Args:
        shifted: layer that takes the shift.
        errors: (G, C) mean of target - output by timestep group and output channel.
    """
    layer, factor = shifted
    assert layer.bias_shift is not None
    corrected = layer.bias_shift + errors.to(layer.bias_shift) * factor
    layer.bias_shift.copy_(corrected.half())  # the artifact holds float16: nothing is left to round off there


@torch.no_grad()
def follow_mean_error(shifted: ShiftedLayer, residuals: Tensor, groups: Tensor, share: float) -> None:
    """Move the bias correction towards the mean error of each timestep group, so that rounding is learned beside it.

    Args:
        shifted: layer that takes the shift.
        residuals: (B, C, ...) target - output of a batch.
        groups: (B,) timestep groups of its samples.
        share: share of a sample's mean error that one step takes over.
    """
    layer, factor = shifted
    assert layer.bias_shift is not None
    counts = (groups[:, None] == groups).sum(1, keepdim=True)  # bincount would wait for the device
    rate = share / (share * counts).clamp(min=1)  # many samples of a group must not overshoot
    layer.bias_shift.index_add_(0, groups, channel_means(residuals) * rate, alpha=factor)
