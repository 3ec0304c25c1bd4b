"""Floating-point grids: a sign, e bits of exponent and m of mantissa, with subnormal numbers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from tcaq_lightning.quantizers.formats.base import FORMATS, NumberFormat

EXPONENT_BITS = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}
"""Integers of a float's size, and which of their bits are its exponent."""


class FloatFormat(NumberFormat):
    """E`exponent`M`mantissa` with the bias 2^(e-1) - 1 unless it says otherwise.

    Scales are real numbers, so that any other bias, a real one too, is a scale: the searched scale of a channel is
    Kuzmin et al.'s searched bias of it (2022, "FP8 Quantization: The Power of the Exponent").

    Codes are the bits of the number: sign, exponent, mantissa. Values are rounded to nearest, ties to even; those
    beyond the ends become the ends.

    Attributes:
        exponent: bits of it.
        mantissa: bits of it.
        specials: codes at the top of each sign that are no finite numbers.
    """

    exponent: ClassVar[int]
    mantissa: ClassVar[int]
    specials: ClassVar[int] = 0
    factors: ClassVar[tuple[float, float]] = (1.5, 0.5)

    @property
    def bias(self) -> int:
        """What is added to exponents."""
        return int(2 ** (self.exponent - 1) - 1)

    def encode(self, values: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The bits of each number."""
        magnitude = values.abs()
        power = self._power(magnitude)
        exponent = power.log2().round_() + self.bias  # exact powers of two
        fraction = magnitude / power  # in [1, 2), or below 1 of subnormal numbers, whose exponent field is 0
        codes: Tensor = (exponent - 1 + fraction) * 2**self.mantissa
        return codes + torch.signbit(values) * 2.0 ** (self.bits - 1)

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The number of each code; NaN of codes that stand for none."""
        return self._numbers().to(codes)[codes.long()]

    def neighbours(self, values: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The numbers around each value."""
        x = values.clamp(*self.ends)
        quantum = self._quantum(x)
        below = (x / quantum).floor_().mul_(quantum)
        on_grid = below == x
        # above a negative power of two, numbers lie as close as below it
        closer = on_grid & (x < 0) & (x.abs() == self._power(x.abs())) & (x.abs() > 2.0 ** (1 - self.bias))
        above = below + torch.where(closer, quantum / 2, quantum)
        above = torch.where((above == 0) & (x < 0), -0.0, above)  # codes tell the two zeros apart
        return below, torch.where(values < self.ends[0], below, above.clamp_(max=self.ends[1]))

    def nearest(self, values: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Rounded to nearest, ties to even."""
        x = values.clamp(*self.ends)
        quantum = self._quantum(x)
        return (x / quantum).round_().mul_(quantum)

    def _power(self, magnitude: Tensor) -> Tensor:
        """The power of two at or below each magnitude; of subnormal numbers that of the smallest normal one."""
        integer, bits = EXPONENT_BITS[magnitude.dtype]
        return (magnitude.view(integer) & bits).view(magnitude.dtype).clamp_(min=2.0 ** (1 - self.bias))

    def _quantum(self, x: Tensor) -> Tensor:
        """Distance of the numbers around each value."""
        return self._power(x.abs()).mul_(2.0**-self.mantissa)

    def _numbers(self) -> Tensor:
        """(2^b,) what each code stands for."""
        fields = torch.arange(2 ** (self.bits - 1), dtype=torch.float64)
        exponent, mantissa = (fields / 2**self.mantissa).floor(), fields % 2**self.mantissa
        fraction = mantissa / 2**self.mantissa + (exponent > 0)
        positive = torch.exp2(exponent.clamp(min=1) - self.bias) * fraction
        positive[len(positive) - self.specials :] = torch.nan
        return torch.cat([positive, -positive])


@FORMATS.register("e4m3")
class E4M3(FloatFormat):
    """FP8 for weights and activations, float8_e4m3fn: up to 448, no infinity, one NaN of each sign.

    >>> E4M3(8).nearest(torch.tensor([0.3, -500.0, 0.0009])).tolist()
    [0.3125, -448.0, 0.0]
    """

    widths: ClassVar[range] = range(8, 9)
    exponent, mantissa, specials = 4, 3, 1


@FORMATS.register("e5m2")
class E5M2(FloatFormat):
    """FP8 of wide range, float8_e5m2: up to 57,344, with infinity and three NaNs of each sign."""

    widths: ClassVar[range] = range(8, 9)
    exponent, mantissa, specials = 5, 2, 4


@FORMATS.register("e3m4")
class E3M4(FloatFormat):
    """8 bits for few outliers; all codes are numbers, up to 31."""

    widths: ClassVar[range] = range(8, 9)
    exponent, mantissa = 3, 4


@FORMATS.register("e2m5")
class E2M5(FloatFormat):
    """8 bits for next to no outliers; all codes are numbers, up to 7.875."""

    widths: ClassVar[range] = range(8, 9)
    exponent, mantissa = 2, 5


@FORMATS.register("e3m2")
class E3M2(FloatFormat):
    """FP6, float6_e3m2fn: up to 28; all codes are numbers."""

    widths: ClassVar[range] = range(6, 7)
    exponent, mantissa = 3, 2


@FORMATS.register("e2m3")
class E2M3(FloatFormat):
    """FP6, float6_e2m3fn: up to 7.5; all codes are numbers."""

    widths: ClassVar[range] = range(6, 7)
    exponent, mantissa = 2, 3


@FORMATS.register("e2m1")
class E2M1(FloatFormat):
    """FP4, float4_e2m1fn: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""

    widths: ClassVar[range] = range(4, 5)
    exponent, mantissa = 2, 1
