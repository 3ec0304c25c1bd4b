"""The frozen denoiser: integer weights, and the tables from which its structure is rebuilt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.models.families import is_attention
from tcaq_lightning.nn.attention import PROCESSORS, QuantAttnProcessor
from tcaq_lightning.nn.layers import LAYERS, QuantLayer
from tcaq_lightning.nn.parts import quant_layers, set_submodule
from tcaq_lightning.quantizers import ActivationQuantizer, AdaRoundWeight, IntegerWeight, PackedWeight, TokenQuantizer
from tcaq_lightning.quantizers.packing import packed_size
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups, TimestepHook


@dataclass(frozen=True)
class LayerEntry:
    """One layer of the table.

    Attributes:
        kind: class of the full-precision layer.
        kept: in full precision; the rest is then meaningless.
        weight_bits, activation_bits: code widths.
        symmetric: all weight zero points are 2^(b-1).
        reparameterized: the input quantizer has an r other than 1. shifted: it has a shift other than 0.
        bias_shift: there is a bias correction for each timestep group.
        input_of: the layer that this one shares its input quantizer with.
        dynamic: the input's steps are found at run time, token by token.
        quantized_output: the output is quantized too.
    """

    kind: str
    kept: bool = False
    weight_bits: int = 8
    activation_bits: int = 8
    symmetric: bool = False
    reparameterized: bool = False
    shifted: bool = False
    bias_shift: bool = False
    input_of: str | None = None
    dynamic: bool = False
    quantized_output: bool = False

    def __post_init__(self) -> None:
        _require_bits(self.weight_bits, self.activation_bits)


@dataclass(frozen=True)
class AttentionEntry:
    """One attention of the table.

    Attributes:
        kept: in full precision; the rest is then meaningless.
        activation_bits, softmax_bits: code widths of q, k, v and of the probabilities.
        processor: class name of the diffusers processor that is computed with quantized operands.
    """

    kept: bool = False
    activation_bits: int = 8
    softmax_bits: int = 8
    processor: str = QuantAttnProcessor.source

    def __post_init__(self) -> None:
        _require_bits(self.activation_bits, self.softmax_bits)
        if self.processor not in PROCESSORS:
            raise ValueError(f"expected one of the attention processors {sorted(PROCESSORS)}, got {self.processor!r}")


def _require_bits(*widths: int) -> None:
    for bits in widths:
        if bits not in range(2, 9):
            raise ValueError(f"expected code widths in 2..8, got {bits!r}")


@dataclass(frozen=True)
class Structure:
    """What of a frozen denoiser's structure its diffusers config does not say.

    Attributes:
        layers: every layer with weights, by name. attentions: every attention, by name.
        boundaries: of the timestep groups.
        dtypes: types of the full-precision model, by tensor or by beginning of the names, "" for all; the longest
            beginning counts. float32 unless it says otherwise.
    """

    layers: dict[str, LayerEntry]
    attentions: dict[str, AttentionEntry]
    boundaries: list[float]
    dtypes: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; entries leave out their defaults, but never their code widths."""
        return {
            "timestep_boundaries": self.boundaries,
            **({"dtypes": self.dtypes} if self.dtypes else {}),
            "layers": {name: _without_defaults(entry) for name, entry in self.layers.items()},
            "attentions": {name: _without_defaults(entry) for name, entry in self.attentions.items()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Structure:
        """Undo `to_dict`, ignoring other keys; KeyError, TypeError, AttributeError or ValueError if they do not fit."""
        return cls(
            {name: LayerEntry(**row) for name, row in values["layers"].items()},
            {name: AttentionEntry(**row) for name, row in values["attentions"].items()},
            [float(boundary) for boundary in values["timestep_boundaries"]],
            {str(name): _dtype_name(_dtype_of(dtype)) for name, dtype in values.get("dtypes", {}).items()},
        )


def _without_defaults(entry: LayerEntry | AttentionEntry) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(entry)}
    return {
        key: value
        for key, value in asdict(entry).items()
        if value != defaults[key] or (key.endswith("_bits") and not entry.kept)
    }


@torch.no_grad()
def freeze(denoiser: nn.Module) -> None:
    """Make a calibrated denoiser's weights integers, in place: full-precision weights and rounding logits are dropped.

    Shifts that are all 0 are dropped too. Bias corrections are rounded to float16, in which they are stored; everything
    else computes the same bits as before.
    """
    for layer in quant_layers(denoiser).values():
        weight = layer.weight_quantizer
        if isinstance(weight, AdaRoundWeight):
            layer.weight_quantizer = IntegerWeight.from_rounded(weight, layer.input_quantizer.r).train(layer.training)
        if layer.input_quantizer.shift is not None and not layer.input_quantizer.shift.any():
            layer.input_quantizer.shift = None
        if layer.input_quantizer.shift is None:
            layer.shift_bias = None
        layer.fold_shift()
        if layer.bias_shift is not None:
            largest = torch.finfo(torch.float16).max
            layer.bias_shift.copy_(layer.bias_shift.clamp(-largest, largest).half())


def describe(denoiser: nn.Module) -> Structure:
    """Structure of a frozen denoiser; ValueError if it is not frozen."""
    layers: dict[str, LayerEntry] = {}
    attentions: dict[str, AttentionEntry] = {}
    boundaries: list[float] = []
    owner: dict[int, str] = {}  # of each input quantizer: the first layer that has it
    for name, module in denoiser.named_modules():
        if isinstance(module, QuantLayer):
            first = owner.setdefault(id(module.input_quantizer), name)
            layers[name] = _describe_layer(module, None if first == name else first)
            boundaries = module.input_quantizer.groups.boundaries
        elif type(module) in LAYERS:
            layers[name] = LayerEntry(type(module).__name__, kept=True)
        elif is_attention(module):
            processor: Any = getattr(module, "processor", None)
            if isinstance(processor, QuantAttnProcessor):
                bits = processor.query.bits, processor.probabilities.bits
                attentions[name] = AttentionEntry(False, *bits, processor.source)
                boundaries = processor.query.groups.boundaries
            else:
                attentions[name] = AttentionEntry(kept=True)
    return Structure(layers, attentions, boundaries, _describe_dtypes(denoiser))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected a type such as bfloat16, got {name!r}")
    return dtype


def _tensors(denoiser: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those too that no file holds, such as tables of positions."""
    yield from denoiser.named_parameters()
    yield from denoiser.named_buffers()


def _describe_dtypes(denoiser: nn.Module) -> dict[str, str]:
    """Types of a frozen denoiser's layers and remaining tensors, as `Structure` keeps them."""
    found: dict[str, str] = {}
    quantized: list[str] = []
    for name, module in denoiser.named_modules():
        if isinstance(module, QuantLayer):
            found[f"{name}."] = _dtype_name(module.dtype)
        if isinstance(module, (QuantLayer, QuantAttnProcessor)):
            quantized.append(f"{name}.")
    for name, tensor in _tensors(denoiser):
        if tensor.is_floating_point() and not name.startswith(tuple(quantized)):
            found[name] = _dtype_name(tensor.dtype)
    kinds = list(found.values())
    usual = max(set(kinds), key=kinds.count, default="float32")
    other = {name: dtype for name, dtype in sorted(found.items()) if dtype != usual}
    return other | ({} if usual == "float32" else {"": usual})


def _convert(denoiser: nn.Module, dtypes: dict[str, str]) -> None:
    """Give a denoiser's tensors the types of a structure, in place."""
    for name, tensor in _tensors(denoiser):
        beginnings = [beginning for beginning in dtypes if name.startswith(beginning)]
        if beginnings and tensor.is_floating_point():
            tensor.data = tensor.data.to(_dtype_of(dtypes[max(beginnings, key=len)]))


def _describe_layer(layer: QuantLayer, input_of: str | None) -> LayerEntry:
    weight, inputs = layer.weight_quantizer, layer.input_quantizer
    if not isinstance(weight, IntegerWeight):
        raise ValueError(f"{layer.name} still learns its rounding; call freeze(denoiser) before")
    return LayerEntry(
        kind=next(source.__name__ for source, replacement in LAYERS.items() if isinstance(layer, replacement)),
        weight_bits=weight.bits,
        activation_bits=inputs.bits,
        symmetric=bool((weight.zero_point == 2 ** (weight.bits - 1)).all()),
        reparameterized=bool((inputs.r != 1).any()),
        shifted=inputs.shift is not None,
        bias_shift=layer.bias_shift is not None,
        input_of=input_of,
        dynamic=isinstance(inputs, TokenQuantizer),
        quantized_output=layer.output_quantizer is not None,
    )


def rebuild(denoiser: nn.Module, structure: Structure, packed: bool = False) -> None:
    """Give a full-precision denoiser the structure of a frozen one, in place; codes are undefined, the rest neutral.

    Args:
        denoiser: of the structure's architecture.
        structure: of the frozen denoiser.
        packed: whether weights stay packed in memory.

    Raises:
        AttributeError, ValueError: the structure is of another architecture.
    """
    groups = TimestepGroups(structure.boundaries)
    _convert(denoiser, structure.dtypes)
    for name, entry in structure.layers.items():
        module = denoiser.get_submodule(name)
        if type(module).__name__ != entry.kind:
            raise ValueError(f"{name} is a {type(module).__name__}, expected a {entry.kind}")
        if not entry.kept:
            set_submodule(denoiser, name, _frozen_layer(module, entry, groups, name, packed))
    for name, entry in structure.layers.items():
        if entry.input_of is not None:
            first: Any = denoiser.get_submodule(entry.input_of)
            denoiser.get_submodule(name).input_quantizer = first.input_quantizer
    for name, attention in structure.attentions.items():
        if not attention.kept:
            owner: Any = denoiser.get_submodule(name)
            processor = PROCESSORS[attention.processor](attention.activation_bits, attention.softmax_bits, groups)
            processor.source = attention.processor
            owner.set_processor(processor.train(owner.training))
    denoiser.register_forward_pre_hook(TimestepHook(groups), with_kwargs=True)


def _frozen_layer(module: Any, entry: LayerEntry, groups: TimestepGroups, name: str, packed: bool) -> QuantLayer:
    replacement: Any = LAYERS[type(module)]
    conv_groups = module.groups if isinstance(module, nn.Conv2d) else 1
    channels = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    scale = torch.ones(module.weight.shape[0], dtype=dtype, device=module.weight.device)
    zero_point = torch.full_like(scale, 2 ** (entry.weight_bits - 1))
    shape = module.weight.shape
    size = (packed_size(shape.numel(), entry.weight_bits),) if packed else shape
    codes, rest = scale.new_empty(size, dtype=torch.uint8), (scale, zero_point, entry.weight_bits, conv_groups)
    weight = PackedWeight(codes, shape, *rest) if packed else IntegerWeight(codes, *rest)
    quantizer = TokenQuantizer if entry.dynamic else ActivationQuantizer
    inputs = quantizer(entry.activation_bits, groups, channels, replacement.channel_dim)
    layer: QuantLayer = replacement(module, weight, inputs, module.bias, name)
    if entry.shifted:
        inputs.allow_shift()
        layer.allow_shift()
        layer.fold_shift()
    if entry.bias_shift:
        layer.allow_bias_shift()
    if entry.quantized_output:
        layer.quantize_output()
    return layer
