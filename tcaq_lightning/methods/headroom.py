"""Headroom: wider ranges for inputs that may leave what calibration has seen (docs/method.md, "Units and order").

Where a pixel lies outside of a tight range on the linear path from the noisy sample to the output, the denoiser does
not see how much noise it has, and leaves the rest in the image, amplified. A norm in between bounds what comes after
it; layers without one read the noisy sample or the residual stream itself.
"""

from __future__ import annotations

from torch import nn

from tcaq_lightning.config import HeadroomConfig
from tcaq_lightning.models.graph import UnitGraph
from tcaq_lightning.nn.parts import quant_layers


def leave_headroom(quantized: nn.Module, graph: UnitGraph, config: HeadroomConfig, activation_bits: int) -> None:
    """Widen the ranges of layers that read the noisy sample or the residual stream with no norm in between.

    The factor is noted in the layers' input quantizers, and applied when their ranges are searched.

    Args:
        quantized: denoiser with quantized layers.
        graph: its units, which know what their layers read.
        config: the factors.
        activation_bits: code width of activations, `quantization.activation.bits`.
    """
    of_sample = config.of_sample(activation_bits)
    for layer in quant_layers(quantized).values():
        if layer.name in graph.direct:
            reads_sample = any(layer.name == unit or layer.name.startswith(f"{unit}.") for unit in graph.readers)
            layer.input_quantizer.headroom = of_sample if reads_sample else config.of_stream
