"""Quantize a denoiser in place: replace its layers, account for every one of them."""

from __future__ import annotations

import copy
from typing import Any, cast

from diffusers.models import attention_processor
from torch import nn

from tcaq_lightning.config import QuantizationConfig, Role
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.families import family_of, is_attention
from tcaq_lightning.nn.attention import PROCESSORS, processor_name, separate_projections
from tcaq_lightning.nn.coverage import (
    DYNAMIC,
    KEPT_BY_RULE,
    UNKNOWN_ATTENTION,
    CoverageRow,
    float_rows,
    own_parameters,
    uncovered,
)
from tcaq_lightning.nn.layers import LAYERS, QuantLayer
from tcaq_lightning.nn.output_layers import output_layer
from tcaq_lightning.nn.parts import find_quantized_units, readers, set_submodule
from tcaq_lightning.nn.rules import LayerBits, bits_of, check_rules
from tcaq_lightning.quantizers import ActivationQuantizer, AdaRoundWeight, TokenQuantizer
from tcaq_lightning.quantizers.output import OUTPUT_BITS
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups, TimestepHook


def quantize(denoiser: nn.Module, config: QuantizationConfig, groups: TimestepGroups) -> list[CoverageRow]:
    """Replace every layer with weights and every attention by its quantized form, in place.

    The quantizers' parameters are neutral until they are set: nothing is calibrated here.

    Args:
        denoiser: a diffusers denoiser.
        config: bits and rules.
        groups: the timestep groups that all quantizers share; a pre-hook that sets them is put on the denoiser.

    Returns:
        The coverage table, one row for each layer with parameters and each attention matmul.

    Raises:
        UserError: a rule that matches nothing, or a module that is neither quantized nor listed as kept.
    """
    check_rules(denoiser, config)
    rows = _separate_projections(denoiser)
    sharing: list[list[str]] = []
    integers: list[str] = []
    roles = family_of(denoiser).roles_of(denoiser)
    for name, module in list(denoiser.named_modules()):
        role = roles.get(name, "block")
        bits = bits_of(name, config, role)
        if type(module) in LAYERS:
            rows.append(_layer_row(name, module, bits, config, role))
            if not bits.kept:
                set_submodule(denoiser, name, _quantized_layer(module, bits, groups, config, name))
                integers += [name] * _quantizes_output(module, bits, config)
            continue
        if is_attention(module):
            sharing += _same_inputs(name, module)
            rows += _quantize_attention(name, module, bits, groups)
        rows += float_rows(name, module, bits)
    if missed := uncovered(denoiser, rows):
        raise UserError(
            f"unsupported layer {missed[0]} shares its weights with another layer that is quantized under its first "
            f"name; expected every layer once: give it a copy of its own"
        )
    for names in sharing:
        _share_input_quantizer([denoiser.get_submodule(n) for n in names])
    for name in integers:
        cast("QuantLayer", denoiser.get_submodule(name)).quantize_output()
    _allow_shifts(denoiser)
    for unit in find_quantized_units(denoiser):
        shifted = output_layer(denoiser.get_submodule(unit), unit)
        if shifted is not None and isinstance(layer := denoiser.get_submodule(shifted[0]), QuantLayer):
            layer.allow_bias_shift()
    denoiser.register_forward_pre_hook(TimestepHook(groups), with_kwargs=True)
    return rows


def _layer_row(name: str, module: nn.Module, bits: LayerBits, config: QuantizationConfig, role: Role) -> CoverageRow:
    kind, parameters = type(module).__name__, own_parameters(module)
    if bits.kept:
        return CoverageRow(name, kind, "float", KEPT_BY_RULE, parameters, role)
    dynamic = config.activation.dynamic_per_token and isinstance(module, nn.Linear)
    widths = f"W{bits.weight} A{bits.activation}"
    if _quantizes_output(module, bits, config):
        widths += f" O{bits.output}"
    return CoverageRow(name, kind, widths, DYNAMIC if dynamic else "", parameters, role)


def _quantizes_output(module: nn.Module, bits: LayerBits, config: QuantizationConfig) -> bool:
    """Whether the output of a layer is quantized.

    Integer kernels want signed weights of 8 bits around 0, and of the others the output stays in float: asymmetric
    codes of 8 bits do not fit there.
    """
    fits = config.weight.symmetric or (bits.weight or 0) < OUTPUT_BITS
    return LAYERS[type(module)].integer_output and bits.output is not None and fits


def _quantized_layer(
    module: nn.Module, bits: LayerBits, groups: TimestepGroups, config: QuantizationConfig, name: str
) -> QuantLayer:
    assert isinstance(module, (nn.Conv2d, nn.Linear))
    assert bits.weight is not None
    assert bits.activation is not None
    replacement: Any = LAYERS[type(module)]
    conv_groups = module.groups if isinstance(module, nn.Conv2d) else 1
    channels = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
    weight = AdaRoundWeight(module.weight, bits.weight, config.weight.symmetric, conv_groups)
    dynamic = config.activation.dynamic_per_token and isinstance(module, nn.Linear)
    kind = TokenQuantizer if dynamic else ActivationQuantizer
    activation = kind(bits.activation, groups, channels, replacement.channel_dim)
    layer: QuantLayer = replacement(module, weight, activation.to(module.weight.device), module.bias, name)
    return layer


def _separate_projections(denoiser: nn.Module) -> list[CoverageRow]:
    """Undo diffusers' fusion of projections; rows of the layers that are gone."""
    rows: list[CoverageRow] = []
    for name, module in list(denoiser.named_modules()):
        if not is_attention(module) or (kind := processor_name(module)) not in PROCESSORS:
            continue
        for fused, parameters in separate_projections(module, name).items():
            rows.append(CoverageRow(fused, "Linear", "as separate", "fused projections, taken apart", parameters))
        if kind.startswith("Fused"):
            separate: Any = getattr(attention_processor, kind.removeprefix("Fused"))
            cast("Any", module).set_processor(separate())
    return rows


def _quantize_attention(name: str, attention: Any, bits: LayerBits, groups: TimestepGroups) -> list[CoverageRow]:
    """Give an attention the processor that quantizes its matmuls, if one is known and no rule keeps it."""
    kind, known = "matmul", processor_name(attention)
    if bits.kept or known not in PROCESSORS:
        note = KEPT_BY_RULE if bits.kept else f"{UNKNOWN_ATTENTION}: {known}"
        return [CoverageRow(f"{name} ({m})", kind, "float", note, 0) for m in ("q k^T", "P v")]
    assert bits.activation is not None
    assert bits.softmax is not None
    quantized = PROCESSORS[known](bits.activation, bits.softmax, groups)
    quantized.source = known
    quantized.to(next(attention.parameters()).device).train(attention.training)
    attention.set_processor(quantized)
    return [
        CoverageRow(f"{name} (q k^T)", kind, f"A{bits.activation} A{bits.activation}", "", 0),
        CoverageRow(f"{name} (P v)", kind, f"P{bits.softmax} A{bits.activation}", "", 0),
    ]


def _same_inputs(name: str, attention: Any) -> list[list[str]]:
    """Names of an attention's layers that read one tensor, for each such tensor."""
    known = PROCESSORS.get(processor_name(attention))
    return [] if known is None else [[f"{name}.{n}" for n in names] for names in known.same_input(attention)]


def _share_input_quantizer(layers: list[Any]) -> None:
    """Give layers that read one tensor one quantizer, if their bits agree."""
    if not all(isinstance(layer, QuantLayer) for layer in layers):
        return
    if len({layer.input_quantizer.bits for layer in layers}) == 1:
        for layer in layers[1:]:
            layer.input_quantizer = layers[0].input_quantizer


def _allow_shifts(denoiser: nn.Module) -> None:
    """Let inputs be shifted where all layers that read them are pointwise."""
    for layers in readers(denoiser).values():
        if all(layer.pointwise for layer in layers):
            layers[0].input_quantizer.allow_shift()
            for layer in layers:
                layer.allow_shift()


def shared_copy(denoiser: nn.Module) -> nn.Module:
    """A copy that has the same parameters, not copies of them: a twin whose layers are to be replaced."""
    return copy.deepcopy(denoiser, {id(p): p for p in denoiser.parameters()})
