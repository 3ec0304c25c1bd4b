"""The one builder of quantized layers and attentions: for calibration, and for what has been calibrated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tcaq_lightning.nn.attention import PROCESSORS, intercept
from tcaq_lightning.nn.convolutions import QuantTransposedConvolution
from tcaq_lightning.nn.grouped import group
from tcaq_lightning.nn.layers import LAYERS, QuantLayer
from tcaq_lightning.nn.parts import set_submodule
from tcaq_lightning.nn.spec import AttentionSpec, LayerSpec
from tcaq_lightning.quantizers import (
    ACTIVATION_QUANTIZERS,
    AdaRoundWeight,
    CodedWeight,
    NumberFormat,
    PackedWeight,
    WeightQuantizer,
    make_format,
)
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups

Weights = Literal["learned", "codes", "packed"]
"""Weights to be calibrated, weights of a frozen denoiser, and these packed in memory as they are on disk."""


def _learned(weight: Tensor, number_format: NumberFormat, conv_groups: int, _symmetric: bool) -> WeightQuantizer:
    return AdaRoundWeight(weight, number_format, conv_groups)


MAKERS: Mapping[Weights, Callable[[Tensor, NumberFormat, int, bool], WeightQuantizer]] = {
    "learned": _learned,
    "codes": CodedWeight.neutral,
    "packed": PackedWeight.neutral,
}


def build(
    denoiser: nn.Module,
    layers: Mapping[str, LayerSpec],
    attentions: Mapping[str, AttentionSpec],
    groups: TimestepGroups,
    weights: Weights = "learned",
) -> None:
    """Replace layers and attention processors by what their specs say, in place; all quantizers are neutral.

    Args:
        denoiser: full precision.
        layers: by name; kept ones stay.
        attentions: likewise.
        groups: the timestep groups that all quantizers share; the denoiser's forward says them.
        weights: which weights the layers get. Of frozen ones, codes are undefined, and so is what is about to be read.

    Raises:
        AttributeError: the denoiser has no module of a name.
        ValueError: it has one of another class.
        UserError: a format, quantizer or processor that is not registered.
    """
    for name, spec in layers.items():
        module = denoiser.get_submodule(name)
        if type(module).__name__ != spec.kind:
            raise ValueError(f"{name} is a {type(module).__name__}, expected a {spec.kind}")
        if not spec.kept:
            set_submodule(denoiser, name, build_layer(module, spec, groups, name, weights))
    built: dict[str, Any] = {name: denoiser.get_submodule(name) for name, spec in layers.items() if not spec.kept}
    for name, layer in built.items():
        if (first := layers[name].input_of) is not None:
            layer.input_quantizer = built[first].input_quantizer
    for name, layer in built.items():
        if layers[name].quantized_output:
            layer.quantize_output()  # of the input's quantizer, too, which is the final one now
    for name, attention in attentions.items():
        owner: Any = denoiser.get_submodule(name)
        if attention.kept:
            continue
        if attention.processor not in PROCESSORS:
            intercept(owner, attention, groups, weights != "learned")
        else:
            processor = PROCESSORS[attention.processor](attention, groups)
            if (parameter := next(owner.parameters(), None)) is not None:
                processor.to(parameter.device)
            owner.set_processor(processor.train(owner.training))
    group(denoiser, groups)


def build_layer(
    source: nn.Module, spec: LayerSpec, groups: TimestepGroups, name: str, weights: Weights = "learned"
) -> QuantLayer:
    """One quantized layer with an input quantizer of its own.

    Args:
        source: the full-precision layer.
        spec: of the layer.
        groups: timestep groups of the denoiser.
        name: of the layer, for messages.
        weights: as in `build`.
    """
    described: Any = source
    replacement: Any = LAYERS[type(source)]
    linear = isinstance(source, nn.Linear)
    conv_groups, channels = (1, described.in_features) if linear else (described.groups, described.in_channels)
    transposed = issubclass(replacement, QuantTransposedConvolution)
    values: Tensor = replacement.source_weight(source) if transposed else described.weight
    number_format = make_format(spec.weight_format, spec.weight_bits, spec.symmetric, spec.weight_granularity)
    weight = MAKERS[weights](values, number_format, conv_groups, spec.symmetric)
    inputs = ACTIVATION_QUANTIZERS[spec.input_quantizer](
        spec.activation_bits, groups, channels, replacement.channel_dim
    ).to(values.device)
    if spec.reparameterized:
        inputs.r.fill_(torch.nan)  # about to be read
    layer: QuantLayer = replacement(source, weight, inputs, described.bias, name, spec)
    if spec.shifted:
        inputs.allow_shift()
        layer.allow_shift()
        if not weight.learns:
            layer.fold_shift()
    if spec.bias_shift:
        layer.allow_bias_shift()
    return layer
