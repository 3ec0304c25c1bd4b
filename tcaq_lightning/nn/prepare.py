"""Quantize a denoiser in place: say what becomes of each of its parts, then build that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from tcaq_lightning.config import QuantizationConfig, Role
from tcaq_lightning.config.checks import FLOAT_BITS
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.families import family_of, is_attention
from tcaq_lightning.models.units import find_units
from tcaq_lightning.nn.attention import (
    PROCESSORS,
    interception,
    processor_name,
    quantized_processor,
    separate_all_projections,
)
from tcaq_lightning.nn.attention.calls import QuantCalls
from tcaq_lightning.nn.build import build
from tcaq_lightning.nn.coverage import (
    KEPT_BY_RULE,
    UNKNOWN_ATTENTION,
    WEIGHT_ONLY,
    CoverageRow,
    attention_rows,
    float_rows,
    layer_row,
    own_parameters,
    uncovered,
)
from tcaq_lightning.nn.layers import LAYERS
from tcaq_lightning.nn.output_layers import output_layer
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.rules import LayerBits, bits_of, check_rules
from tcaq_lightning.nn.spec import DYNAMIC, AttentionSpec, LayerSpec
from tcaq_lightning.nn.state import full_precision
from tcaq_lightning.quantizers import make_format
from tcaq_lightning.quantizers.output import OUTPUT_BITS
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.quantizers.unquantized import FloatQuantizer


@dataclass
class Preparation:
    """What becomes of a denoiser's parts.

    Attributes:
        layers: every layer with weights, by name.
        attentions: every attention, by name.
        rows: the coverage table.
    """

    layers: dict[str, LayerSpec] = field(default_factory=dict)
    attentions: dict[str, AttentionSpec] = field(default_factory=dict)
    rows: list[CoverageRow] = field(default_factory=list)


def quantize(denoiser: nn.Module, config: QuantizationConfig, groups: TimestepGroups) -> list[CoverageRow]:
    """Replace every layer with weights and every attention by its quantized form, in place.

    The quantizers' parameters are neutral until they are set: nothing is calibrated here.

    Args:
        denoiser: a diffusers denoiser.
        config: bits and rules.
        groups: the timestep groups that all quantizers share; the denoiser's forward says them.

    Returns:
        The coverage table, one row for each layer with parameters and each attention matmul.

    Raises:
        UserError: a rule that matches nothing, or a module that is neither quantized nor listed as kept.
    """
    check_rules(denoiser, config)
    separated = separate_all_projections(denoiser)
    rows = [
        CoverageRow(name, "Linear", "as separate", "fused projections, taken apart", parameters)
        for name, parameters in separated.items()
    ]
    prepared = describe(denoiser, config)
    build(denoiser, prepared.layers, prepared.attentions, groups)
    for layer in quant_layers(denoiser).values():
        layer.learned_weight.norm = config.range_norm
    for quantizer in quantizers(denoiser).values():
        if quantizer.place != "probabilities":
            quantizer.norm = config.range_norm
    rows += prepared.rows
    if missed := uncovered(denoiser, rows):
        raise UserError(
            f"unsupported layer {missed[0]} shares its weights with another layer that is quantized under its first "
            f"name; expected every layer once: give it a copy of its own"
        )
    return rows


@torch.no_grad()
def foresee_calls(denoiser: nn.Module, run: Callable[[], Any], rows: list[CoverageRow]) -> list[CoverageRow]:
    """Run a quantized denoiser once, in full precision, so that every call of its attentions has quantizers.

    Args:
        denoiser: after `quantize`.
        run: calls it; it is not called where all attentions are written anew.
        rows: its coverage table.

    Returns:
        The coverage table with the rows of all calls.
    """
    calls = {n: q for n, m in denoiser.named_modules() if isinstance(q := quantized_processor(m), QuantCalls)}
    if not calls:
        return rows
    with full_precision(denoiser):
        run()
    last = {f"{name} (P v)": name for name in calls}
    found = []
    for row in rows:
        found.append(row)
        if (name := last.get(row.name)) is not None:
            found += attention_rows(name, calls[name].describe(), row.note)[2:]
    return found


def describe(denoiser: nn.Module, config: QuantizationConfig) -> Preparation:
    """Say what becomes of every part of a full-precision denoiser.

    Args:
        denoiser: left as it is.
        config: bits and rules.

    Raises:
        UserError: a module with weights that no quantized layer is known for, and that no rule keeps.
    """
    found = Preparation()
    sharing: list[tuple[str, ...]] = []
    roles = family_of(denoiser).roles_of(denoiser)
    for name, module in denoiser.named_modules():
        role = roles.get(name, "block")
        bits = bits_of(name, config, role)
        if type(module) in LAYERS:
            found.layers[name] = spec = _layer_spec(module, bits, config, role)
            found.rows.append(layer_row(name, spec, own_parameters(module)))
            continue
        if is_attention(module):
            known = processor_name(module)
            found.attentions[name] = attention = _attention_spec(module, bits, config)
            note = _why_kept(bits, known) if attention.kept else ""
            found.rows += attention_rows(name, attention, note)
            if known in PROCESSORS:
                sharing += [tuple(f"{name}.{n}" for n in names) for names in PROCESSORS[known].same_input(module)]
        found.rows += float_rows(name, module, bits)
    for names in sharing:
        _share_input(found.layers, names)
    _allow_shifts(denoiser, found.layers)
    return found


def _layer_spec(module: nn.Module, bits: LayerBits, config: QuantizationConfig, role: Role) -> LayerSpec:
    kind = type(module).__name__
    if bits.weight is None or bits.activation is None:
        return LayerSpec(kind, kept=True, role=role)
    return LayerSpec(
        kind,
        weight_bits=bits.weight,
        activation_bits=bits.activation,
        symmetric=config.weight.symmetric,
        input_quantizer=_input_quantizer(module, bits.activation, config),
        quantized_output=_quantizes_output(module, bits, config),
        weight_format=bits.weight_format,
        weight_granularity=bits.weight_granularity,
        role=role,
    )


def _input_quantizer(module: nn.Module, bits: int, config: QuantizationConfig) -> str:
    """Kind of the quantizer of a layer's input."""
    if bits == FLOAT_BITS:
        return FloatQuantizer.kind
    return (
        DYNAMIC
        if config.activation.dynamic_per_token and isinstance(module, nn.Linear)
        else config.activation.quantizer
    )


def _why_kept(bits: LayerBits, processor: str) -> str:
    """Note of an attention whose matmuls are computed in full precision."""
    if bits.kept:
        return KEPT_BY_RULE
    return WEIGHT_ONLY if FLOAT_BITS in (bits.activation, bits.softmax) else f"{UNKNOWN_ATTENTION}: {processor}"


def _quantizes_output(module: nn.Module, bits: LayerBits, config: QuantizationConfig) -> bool:
    """Whether the output of a layer is quantized.

    Integer kernels take integer weights that lie around 0 within 8 bits: asymmetric codes of 8 bits do not fit, and
    the output of such a layer stays in floating point.
    """
    if not LAYERS[type(module)].integer_output or bits.output is None or bits.activation == FLOAT_BITS:
        return False
    width = bits.weight or 0
    fits = config.weight.symmetric or width < OUTPUT_BITS
    return fits and make_format(bits.weight_format, width, config.weight.symmetric, bits.weight_granularity).integers


def _attention_spec(module: nn.Module, bits: LayerBits, config: QuantizationConfig) -> AttentionSpec:
    """What computes an attention's matmuls: quantized ones, if they can be found and no rule keeps them."""
    known = processor_name(module)
    if bits.activation is None or bits.softmax is None or not (known in PROCESSORS or interception(module)):
        return AttentionSpec(kept=True)
    if FLOAT_BITS in (bits.activation, bits.softmax):
        return AttentionSpec(kept=True)
    return AttentionSpec(False, bits.activation, bits.softmax, known, config.activation.quantizer)


def _share_input(layers: dict[str, LayerSpec], names: tuple[str, ...]) -> None:
    """Give layers that read one tensor one quantizer, if all of them are quantized and their bits agree."""
    specs = [layers.get(name) for name in names]
    widths = {spec.activation_bits for spec in specs if spec is not None and not spec.kept}
    if len(widths) == 1 and all(spec is not None and not spec.kept for spec in specs):
        for name in names[1:]:
            layers[name] = replace(layers[name], input_of=names[0])


def _allow_shifts(denoiser: nn.Module, layers: dict[str, LayerSpec]) -> None:
    """Let inputs be shifted where all layers that read them are pointwise, and biases where they shift a unit."""
    readers: dict[str, list[str]] = {}
    for name, spec in layers.items():
        if not spec.kept and spec.activation_bits != FLOAT_BITS:
            readers.setdefault(spec.input_of or name, []).append(name)
    for names in readers.values():
        modules = [denoiser.get_submodule(name) for name in names]
        if all(LAYERS[type(module)].is_pointwise(module) for module in modules):
            layers.update({name: replace(layers[name], shifted=True) for name in names})
    for unit in find_units(denoiser):
        shifted = output_layer(denoiser.get_submodule(unit), unit)
        if shifted is not None and _is_quantized(layers, shifted[0]):
            layers[shifted[0]] = replace(layers[shifted[0]], bias_shift=True)


def _is_quantized(layers: Mapping[str, LayerSpec], name: str) -> bool:
    return name in layers and not layers[name].kept


def shared_copy(denoiser: nn.Module) -> nn.Module:
    """A copy that has the same parameters, not copies of them: a twin whose layers are to be replaced."""
    return copy.deepcopy(denoiser, {id(p): p for p in denoiser.parameters()})
