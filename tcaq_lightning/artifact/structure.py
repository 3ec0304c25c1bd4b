"""The structure of a frozen denoiser: the tables of its artifact, from which it is rebuilt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.models.families import is_attention
from tcaq_lightning.nn.attention import QuantAttnProcessor, quantized_processor
from tcaq_lightning.nn.build import build
from tcaq_lightning.nn.layers import LAYERS, QuantLayer
from tcaq_lightning.nn.spec import AttentionSpec, LayerSpec
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups


@dataclass(frozen=True)
class Structure:
    """What of a frozen denoiser's structure its diffusers config does not say.

    Attributes:
        layers: every layer with weights, by name.
        attentions: every attention, by name.
        boundaries: of the timestep groups.
        dtypes: types of the full-precision model, by tensor or by beginning of the names, "" for all; the longest
            beginning counts. float32 unless it says otherwise.
    """

    layers: dict[str, LayerSpec]
    attentions: dict[str, AttentionSpec]
    boundaries: list[float]
    dtypes: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; specs leave out their defaults, but never their code widths."""
        return {
            "timestep_boundaries": self.boundaries,
            **({"dtypes": self.dtypes} if self.dtypes else {}),
            "layers": {name: spec.to_dict() for name, spec in self.layers.items()},
            "attentions": {name: spec.to_dict() for name, spec in self.attentions.items()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Structure:
        """Undo `to_dict`, ignoring other keys; KeyError, TypeError, AttributeError or ValueError if they do not fit."""
        return cls(
            _checked_sharing({name: LayerSpec.from_dict(row) for name, row in values["layers"].items()}),
            {name: AttentionSpec.from_dict(row) for name, row in values["attentions"].items()},
            _checked_boundaries(values["timestep_boundaries"]),
            {str(name): _dtype_name(dtype_of(dtype)) for name, dtype in values.get("dtypes", {}).items()},
        )

    def difference(self, other: Structure) -> str | None:
        """Name of a layer or attention that is quantized otherwise than in another structure; None if all agree."""
        own: dict[str, Any] = {**self.layers, **self.attentions}
        others: dict[str, Any] = {**other.layers, **other.attentions}
        return next((name for name in [*own, *others] if own.get(name) != others.get(name)), None)


def describe(denoiser: nn.Module) -> Structure:
    """Structure of a frozen denoiser.

    Raises:
        ValueError: it is not frozen.
    """
    layers: dict[str, LayerSpec] = {}
    attentions: dict[str, AttentionSpec] = {}
    boundaries: list[float] = []
    owner: dict[int, str] = {}  # of each input quantizer: the first layer that has it
    for name, module in denoiser.named_modules():
        if isinstance(module, QuantLayer):
            if module.weight_quantizer.learns:
                raise ValueError(f"{module.name} still learns its rounding; call freeze(denoiser) before")
            first = owner.setdefault(id(module.input_quantizer), name)
            layers[name] = module.describe(None if first == name else first)
            boundaries = module.input_quantizer.groups.boundaries
        elif type(module) in LAYERS:
            layers[name] = LayerSpec(type(module).__name__, kept=True)
        elif is_attention(module):
            processor = quantized_processor(module)
            attentions[name] = AttentionSpec(kept=True) if processor is None else processor.describe()
            boundaries = boundaries if processor is None else processor.query.groups.boundaries
    return Structure(layers, attentions, boundaries, _describe_dtypes(denoiser))


def rebuild(denoiser: nn.Module, structure: Structure, packed: bool = False) -> None:
    """Give a full-precision denoiser the structure of a frozen one, in place; codes are undefined, the rest neutral.

    Args:
        denoiser: of the structure's architecture.
        structure: of the frozen denoiser.
        packed: whether weights stay packed in memory.

    Raises:
        AttributeError: the structure is of another architecture.
        ValueError: likewise.
        UserError: a number format, quantizer or attention processor that is not registered.
    """
    _convert(denoiser, structure.dtypes)
    groups = TimestepGroups(structure.boundaries)
    build(denoiser, structure.layers, structure.attentions, groups, "packed" if packed else "codes")


def _checked_boundaries(values: Any) -> list[float]:
    """Boundaries of timestep groups: numbers, finite and ascending, as `bucketize` needs them."""
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"expected numbers as timestep_boundaries, got {str(values)[:100]}")
    if not all(map(math.isfinite, values)) or any(a >= b for a, b in pairwise(values)):
        raise ValueError(f"expected finite ascending timestep_boundaries, got {str(values)[:100]}")
    return [float(value) for value in values]


def _checked_sharing(layers: dict[str, LayerSpec]) -> dict[str, LayerSpec]:
    """Layers that share input quantizers with others, which have their own."""
    for name, row in layers.items():
        if row.input_of is not None and (row.input_of not in layers or layers[row.input_of].input_of is not None):
            raise ValueError(f"expected a layer with an input quantizer of its own as input_of of {name}")
    return layers


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The floating-point type of a name, such as bfloat16; AttributeError, TypeError or ValueError if there is none."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
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
            tensor.data = tensor.data.to(dtype_of(dtypes[max(beginnings, key=len)]))
