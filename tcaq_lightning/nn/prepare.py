"""Quantize a denoiser in place: replace its layers, account for every one of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from diffusers.models import attention_processor
from diffusers.models.embeddings import GaussianFourierProjection
from torch import Tensor, nn

from tcaq_lightning.config import QuantizationConfig, Role
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.families import family_of, is_attention
from tcaq_lightning.models.units import find_units
from tcaq_lightning.nn.attention import PROCESSORS, processor_name, separate_projections
from tcaq_lightning.nn.layers import QuantConv2d, QuantLayer, QuantLinear
from tcaq_lightning.nn.output_layers import output_layer
from tcaq_lightning.quantizers import (
    ActivationQuantizer,
    AdaRoundWeight,
    OutputQuantizer,
    Rounding,
    SoftmaxQuantizer,
    TokenQuantizer,
)
from tcaq_lightning.quantizers.output import OUTPUT_BITS
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups, TimestepHook

LAYERS: dict[type[nn.Module], type[QuantLayer]] = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
"""Layers with weights, and what replaces them. Extend to add a kind."""

FLOAT_LAYERS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.Embedding, GaussianFourierProjection)
"""Modules whose parameters stay in full precision: norms, look-ups, and the fixed frequencies of a time projection."""

KEPT_BY_RULE = "kept by rule"
"""Note of what a rule keeps in full precision."""
ELEMENTWISE = "added or multiplied elementwise"
"""Note of parameters that are no layer's: tables, gates, tokens."""
UNKNOWN_ATTENTION = "unknown attention"
"""How the note begins of matmuls in full precision because no quantized processor is known."""
PREDICTION: Role = "output"
"""Role of the convolution whose output is a UNet's prediction: 8 bits of it cost more error than those of all others,
and its integer kernel saves next to nothing."""
DYNAMIC = "dynamic per token"
"""Note of layers whose inputs are quantized with steps found at run time."""


@dataclass(frozen=True)
class LayerBits:
    """Bits of one layer or attention under the rules; None where that operand stays in full precision.

    The output's are of the kinds of layers whose outputs are quantized.
    """

    weight: int | None
    activation: int | None
    softmax: int | None
    output: int | None = None

    @property
    def kept(self) -> bool:
        """Whether the layer stays in full precision."""
        return self.weight is None


@dataclass(frozen=True)
class CoverageRow:
    """One line of the coverage table.

    Attributes:
        name: of the layer, or of the attention with the matmul, such as `mid_block.attentions.0 (q k^T)`.
        kind: module class, or `matmul`.
        bits: such as `W4 A8`, with a quantized output `W4 A8 O8`, or `float`.
        note: why it is in full precision, or empty.
        parameters: number of parameters that the row accounts for.
        role: of a layer with weights, what it is for in the denoiser; else empty.
    """

    name: str
    kind: str
    bits: str
    note: str
    parameters: int
    role: str = ""


def bits_of(name: str, config: QuantizationConfig, role: Role = "block") -> LayerBits:
    """Bits of the layer or attention called `name`: the general ones, changed by every rule that matches, in order.

    >>> from tcaq_lightning.config import LayerRule
    >>> rules = [LayerRule("conv_*", weight_bits=8), LayerRule(role="input", activation_bits=6)]
    >>> bits_of("conv_in", QuantizationConfig(rules=rules), "input")
    LayerBits(weight=8, activation=6, softmax=8, output=None)
    """
    weight: int | None = config.weight.bits
    activation: int | None = config.activation.bits
    softmax = config.softmax.bits or config.activation.bits
    float_output = role == PREDICTION
    kept = False
    for rule in config.rules:
        if rule.matches(name, role):
            about_bits = any((rule.weight_bits, rule.activation_bits, rule.softmax_bits))
            kept = rule.keep or (kept and rule.float_output is not None and not about_bits)
            weight = rule.weight_bits or weight
            activation = rule.activation_bits or activation
            softmax = rule.softmax_bits or softmax
            float_output = float_output if rule.float_output is None else rule.float_output
    output = OUTPUT_BITS if config.integer_ready and not float_output else None
    return LayerBits(None, None, None) if kept else LayerBits(weight, activation, softmax, output)


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
    _check_rules(denoiser, config)
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
        rows += _float_rows(name, module, bits)
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


def find_quantized_units(denoiser: nn.Module) -> list[str]:
    """Units of a denoiser whose layers have been replaced."""
    return find_units(denoiser, layers=(*LAYERS, QuantLayer))


def quant_layers(module: nn.Module) -> dict[str, QuantLayer]:
    """Quantized layers within a module, by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, QuantLayer)}


def quantizers(module: nn.Module) -> dict[str, ActivationQuantizer | SoftmaxQuantizer]:
    """Activation and softmax quantizers within a module, each once, by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, (ActivationQuantizer, SoftmaxQuantizer))}


def output_quantizers(module: nn.Module) -> list[OutputQuantizer]:
    """Quantizers of the outputs of layers within a module."""
    return [m for m in module.modules() if isinstance(m, OutputQuantizer)]


def _check_rules(denoiser: nn.Module, config: QuantizationConfig) -> None:
    names = [
        name
        for name, module in denoiser.named_modules()
        if is_attention(module) or any(True for _ in module.parameters(recurse=False))
    ]
    for rule in config.rules:
        if rule.pattern is not None and not any(fnmatchcase(name, rule.pattern) for name in names):
            raise UserError(
                f"quantization.rules: pattern {rule.pattern!r} matches no layer or attention of "
                f"{type(denoiser).__name__}; expected shell-style patterns on names such as {names[-1]}"
            )
        if rule.float_output is not None and not config.integer_ready:
            raise UserError(
                f"quantization.rules: {rule.role or rule.pattern!r} sets float_output, which is about quantized "
                "outputs; expected quantization.integer_ready: true beside it"
            )


def _layer_row(name: str, module: nn.Module, bits: LayerBits, config: QuantizationConfig, role: Role) -> CoverageRow:
    kind, parameters = type(module).__name__, _own_parameters(module)
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


def _own_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False))


def _float_rows(name: str, module: nn.Module, bits: LayerBits) -> list[CoverageRow]:
    """Rows of the parameters that a module has itself and that stay in full precision.

    Of a module without others within, vectors are a norm's or a scale's. Of one with others, what is not called a
    weight is a table, a gate or a token of its own. Anything else may be an operand of a product.
    """
    own, kind = _own_parameters(module), type(module).__name__
    if not own:
        return []
    if isinstance(module, FLOAT_LAYERS):
        return [CoverageRow(name, kind, "float", "normalisation or look-up", own)]
    if bits.kept:
        return [CoverageRow(name, kind, "float", KEPT_BY_RULE, own)]
    leaf = not any(True for _ in module.children())
    product = isinstance(module, (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd))
    rows = []
    for parameter_name, parameter in module.named_parameters(recurse=False):
        full_name = f"{name}.{parameter_name}" if name else parameter_name
        vector = not product and all(size == 1 for size in parameter.shape[:-1])
        if not vector and (leaf or parameter_name.endswith("weight")):
            raise UserError(
                f"unsupported layer {name} ({kind}) has weights that no quantized layer is known for; keep it in full "
                f"precision with a rule: quantization.rules: [{{pattern: {name}, keep: true}}]"
            )
        rows.append(CoverageRow(full_name, "parameter", "float", ELEMENTWISE, parameter.numel()))
    return rows


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


def readers(module: nn.Module) -> dict[int, list[QuantLayer]]:
    """Layers within a module by the id of the input quantizer that they read."""
    found: dict[int, list[QuantLayer]] = {}
    for layer in quant_layers(module).values():
        found.setdefault(id(layer.input_quantizer), []).append(layer)
    return found


def _allow_shifts(denoiser: nn.Module) -> None:
    """Let inputs be shifted where all layers that read them are pointwise."""
    for layers in readers(denoiser).values():
        if all(layer.pointwise for layer in layers):
            layers[0].input_quantizer.allow_shift()
            for layer in layers:
                layer.allow_shift()


def set_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one called `name`, in the same training mode."""
    parent, _, child = name.rpartition(".")
    owner = root.get_submodule(parent)
    module.train(owner.training)
    setattr(owner, child, module)


@torch.no_grad()
def uncovered(denoiser: nn.Module, rows: list[CoverageRow]) -> list[str]:
    """Names of layers with weights that the coverage table does not account for."""
    listed = {row.name for row in rows}
    return [n for n, m in denoiser.named_modules() if isinstance(m, (*LAYERS, QuantLayer)) and n not in listed]


@contextmanager
def full_precision(unit: nn.Module) -> Iterator[None]:
    """Switch all quantizers of a unit off for a while: its layers then compute with the original weights."""
    layers = list(quant_layers(unit).values())
    activations = [*quantizers(unit).values(), *output_quantizers(unit)]
    for quantizer in activations:
        quantizer.enabled = False
    for layer in layers:
        layer.learned_weight.rounding = Rounding.FLOAT
    try:
        yield
    finally:
        for quantizer in activations:
            quantizer.enabled = True
        for layer in layers:
            layer.learned_weight.rounding = Rounding.HARD


def shared_copy(denoiser: nn.Module) -> nn.Module:
    """A copy that has the same parameters, not copies of them: a twin whose layers are to be replaced."""
    return copy.deepcopy(denoiser, {id(p): p for p in denoiser.parameters()})


@torch.no_grad()
def settle(module: nn.Module) -> None:
    """Settle the rounding of all layers within a module: of their logits nothing is left but codes."""
    for layer in quant_layers(module).values():
        layer.learned_weight.settle(layer.input_quantizer.r)


def quantization_state(module: nn.Module) -> dict[str, Tensor]:
    """What calibration sets and learns in a module: everything but the full-precision parameters.

    Rounding logits are part of it where layers are open.
    """
    return {k: v.detach().clone() for k, v in _calibrated(module).items()}


def _calibrated(module: nn.Module) -> dict[str, Tensor]:
    layers = quant_layers(module)
    full_precision = {f"{n}.weight_quantizer.weight" if n else "weight_quantizer.weight" for n in layers}
    full_precision |= {n for n, _ in module.named_parameters() if n not in full_precision}
    return {k: v for k, v in module.state_dict().items() if k not in full_precision}


def _logits_names(module: nn.Module) -> dict[str, QuantLayer]:
    """Layers by the name of their rounding logits."""
    return {f"{n}.weight_quantizer.v".removeprefix("."): layer for n, layer in quant_layers(module).items()}


def check_quantization_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """See that a state from `quantization_state` is of this module.

    Raises:
        KeyError: it is the state of another module.
    """
    logits = _logits_names(module)
    expected = {k: v.shape for k, v in _calibrated(module).items() if k not in logits}
    expected |= {k: layer.learned_weight.weight.shape for k, layer in logits.items() if k in state}
    if {k: v.shape for k, v in state.items()} != expected:
        raise KeyError("the stored state does not fit the unit")


def restore_quantization_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a state from `quantization_state` back; layers whose logits it holds are open afterwards, others are not.

    Raises:
        KeyError: it is the state of another module.
    """
    check_quantization_state(module, state)
    for name, layer in _logits_names(module).items():
        if name in state:
            layer.learned_weight.open()
        else:
            layer.learned_weight.discard_logits()
    module.load_state_dict(state, strict=False)
