"""What a quantized layer or attention is: described once, built, tabled, stored and exported from that."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from tcaq_lightning.config import Role
from tcaq_lightning.config.checks import FLOAT_BITS
from tcaq_lightning.config.values import check_types
from tcaq_lightning.errors import UserError

DYNAMIC = "token"
"""Input quantizer whose JSON is `dynamic: true`, as the first release wrote it."""


@dataclass(frozen=True)
class LayerSpec:
    """One layer with weights.

    Attributes:
        kind: class of the full-precision layer.
        kept: in full precision; the rest is then meaningless.
        weight_bits: code width of the weight.
        activation_bits: code width of the input; 16: it stays in floating point.
        symmetric: all weight zero points are 2^(b-1).
        reparameterized: the input quantizer has an r other than 1.
        shifted: it has a shift, or may have one.
        bias_shift: there is a bias correction for each timestep group.
        input_of: the layer that this one shares its input quantizer with.
        input_quantizer: kind of the input's quantizer, one of `ACTIVATION_QUANTIZERS`.
        quantized_output: the output is quantized too.
        weight_format: number format of the weight, one of `FORMATS`.
        weight_granularity: which values of it share a scale; None as the format has it.
        role: what the layer is for in its denoiser; not stored.
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
    input_quantizer: str = "uniform"
    quantized_output: bool = False
    weight_format: str = "int"
    weight_granularity: int | str | None = None
    role: Role = field(default="block", compare=False)

    def __post_init__(self) -> None:
        _require_types(self)
        _require_bits(self.weight_bits, 8 if self.activation_bits == FLOAT_BITS else self.activation_bits)

    @property
    def dynamic(self) -> bool:
        """Whether the input's steps are found at run time, token by token."""
        return self.input_quantizer == DYNAMIC

    @property
    def widths(self) -> str:
        """For tables: `W4 A8`, `W4 A8 O8`, `W4(pow2) A8`, `W4(by 64) A16`, or `float`."""
        if self.kept:
            return "float"
        words = [] if self.weight_format == "int" else [self.weight_format]
        words += [] if self.weight_granularity is None else [f"by {self.weight_granularity}"]
        named = f"({' '.join(words)})" if words else ""
        return f"W{self.weight_bits}{named} A{self.activation_bits}{' O8' if self.quantized_output else ''}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; defaults are left out, but never code widths."""
        values = _without_defaults(self)
        if self.dynamic:  # keys stay in their order, so that the files of today come out bit for bit
            values = {("dynamic" if k == "input_quantizer" else k): v for k, v in values.items()}
            values["dynamic"] = True
        values.pop("role", None)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerSpec:
        """Undo `to_dict`; TypeError or ValueError if the values do not fit."""
        values = dict(values)
        if values.pop("dynamic", False):
            values["input_quantizer"] = DYNAMIC
        return cls(**values)


@dataclass(frozen=True)
class AttentionSpec:
    """One attention: what its matmuls are computed with.

    Attributes:
        kept: in full precision; the rest is then meaningless.
        activation_bits: code width of q, k and v.
        softmax_bits: code width of the probabilities.
        processor: class name of the diffusers processor that is computed with quantized operands.
        quantizer: kind of the quantizers of q, k and v, one of `ACTIVATION_QUANTIZERS`.
        calls: how often attention is computed in one forward pass, each time with quantizers of its own.
    """

    kept: bool = False
    activation_bits: int = 8
    softmax_bits: int = 8
    processor: str = "AttnProcessor2_0"
    quantizer: str = "uniform"
    calls: int = 1

    def __post_init__(self) -> None:
        _require_types(self)
        _require_bits(self.activation_bits, self.softmax_bits)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; defaults are left out, but never code widths."""
        return _without_defaults(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AttentionSpec:
        """Undo `to_dict`; TypeError or ValueError if the values do not fit."""
        return cls(**values)


def _require_types(spec: LayerSpec | AttentionSpec) -> None:
    """Check that values, which may come from a file, have the types of their fields."""
    try:
        check_types(spec, type(spec).__name__)
    except UserError as error:  # of the file that they come from, which the reader names
        raise ValueError(str(error)) from error


def _require_bits(*widths: int) -> None:
    for bits in widths:
        if bits not in range(2, 9):
            raise ValueError(f"expected code widths in 2..8, got {bits!r}")


def _without_defaults(spec: LayerSpec | AttentionSpec) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(spec)}
    values = {name: getattr(spec, name) for name in defaults}
    return {k: v for k, v in values.items() if v != defaults[k] or (k.endswith("_bits") and not spec.kept)}
