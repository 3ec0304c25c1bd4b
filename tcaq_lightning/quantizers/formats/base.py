"""The contract of number formats: what the codes of a weight stand for, and which of them share a scale."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tcaq_lightning.errors import UserError
from tcaq_lightning.quantizers.range_search import NORM, powers
from tcaq_lightning.runtime.registry import Registry


@dataclass(frozen=True)
class Sharing:
    """Which values of a weight (O, I, ...) share a scale.

    Attributes:
        group: so many neighbouring inputs of an output channel share one, the last ones what is left; None: all of it.
        whole: whether one scale is everybody's.

    >>> Sharing().shape((4, 6, 3, 3)), Sharing(group=2).shape((4, 6, 3, 3)), Sharing(whole=True).shape((4, 6))
    ((4,), (4, 3), (1,))
    """

    group: int | None = None
    whole: bool = False

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a weight of that shape."""
        if self.whole:
            return (1,)
        return weight[:1] if self.group is None else (weight[0], -(-weight[1] // self.group))

    def rows(self, weight: Tensor) -> Tensor:
        """(R, N): the values of each scale in a row, in the scales' order; what is missing of a last group is 0."""
        if self.whole:
            return weight.reshape(1, -1)
        if self.group is None:
            return weight.flatten(1)
        missing = -weight.shape[1] % self.group
        padded = torch.cat([weight, weight.new_zeros(weight.shape[0], missing, *weight.shape[2:])], dim=1)
        return torch.unflatten(padded, 1, (-1, self.group)).flatten(0, 1).flatten(1)

    def spread(self, scales: Tensor, weight: Tensor) -> Tensor:
        """Scales of `shape` beside a weight, to which they broadcast."""
        if self.group is None:
            return scales.view(-1, *[1] * (weight.ndim - 1))
        beside = scales.repeat_interleave(self.group, dim=1)[:, : weight.shape[1]]  # (O, I)
        return beside.view(*beside.shape, *[1] * (weight.ndim - 2))


class NumberFormat(ABC):
    """What codes of b bits stand for: a grid of values in steps of a scale.

    A subclass says what a code stands for and which grid values are the neighbours of a value; that is all that
    rounding to nearest and learned rounding need. It is entered under a name, which `quantization.weight.format` takes:

        @FORMATS.register("mine")
        class Mine(NumberFormat): ...

    Values and grid values are in steps of the scale, and tensors of any shape. Where `zero_points` is set, methods are
    given a zero point, broadcastable to the values; else None.

    Args:
        bits: code width b, one of `widths`.
        symmetric: whether zero points are constant; must be true of formats without them.
        name: in the registry.

    Raises:
        UserError: a width or symmetry that the format does not have.

    Attributes:
        widths: code widths that it has, within 2..8.
        integers: whether grid values are the integers c - z, with a scale for each output channel: what integer kernels
            of engines can multiply.
        zero_points: whether grids are moved by zero points.
        sharing: which values share a scale.
        scale_dtype: of scales in the artifact, to which `storable` rounds; None: that in which they are computed.
    """

    widths: ClassVar[range] = range(2, 9)
    integers: ClassVar[bool] = False
    zero_points: ClassVar[bool] = False
    sharing: ClassVar[Sharing] = Sharing()
    scale_dtype: ClassVar[torch.dtype | None] = None

    def __init__(self, bits: int, symmetric: bool = True, name: str = "") -> None:
        self.name = kind = name or type(self).__name__
        if bits not in self.widths:
            first, last = self.widths[0], self.widths[-1]
            raise UserError(
                f"quantization.weight.bits must be in {first}..{last} for quantization.weight.format {kind}, got {bits}"
            )
        if not (symmetric or self.zero_points):
            raise UserError(
                f"quantization.weight.symmetric must be true for quantization.weight.format {kind}, which has no zero "
                "points, got false"
            )
        self.bits, self.symmetric = bits, symmetric

    @abstractmethod
    def encode(self, values: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Codes of grid values, as integers in 0..2^b - 1 of the values' floating type."""

    @abstractmethod
    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Grid values of codes, which come in a floating type; the codes' memory may be used for them."""

    @abstractmethod
    def neighbours(self, values: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Grid values around each value: the largest that is not above it, and the next one.

        Beyond an end of the grid both are that end; a value between has two different ones.
        """

    def nearest(self, values: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Grid value nearest to each value; the lower one of two that are equally near."""
        below, above = self.neighbours(values, zero_point)
        return torch.where(values - below <= above - values, below, above)

    def rounded(self, values: Tensor, up: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
        """Codes of each value's neighbour above where `up`, else below; None is up everywhere."""
        below, above = self.neighbours(values, zero_point)
        return self.encode(above if up is None else torch.where(up, above, below), zero_point)

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Round to nearest and go back, with gradients for learning.

        The gradient to `x` is straight-through between the grid's ends and 0 beyond them, that to the scale is LSQ's
        (Esser et al. 2020): sum(g (q - x / s)) between the ends and sum(g q) beyond.

        Args:
            x: any shape.
            scale: positive, broadcastable to `x`.
            zero_point: likewise, or None.
        """
        steps = x / scale
        with torch.no_grad():
            below, above = self.neighbours(steps, zero_point)
            grid = torch.where(steps - below <= above - steps, below, above)
            outside = below == above
        moving = torch.where(outside, steps.detach(), steps)
        return (grid + (moving - moving.detach())) * scale

    def search(
        self, rows: Tensor, candidates: int = 80, norm: float = NORM, symmetric: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Best scale of every row: of so many shrink factors, the one with the least error.

        Args:
            rows: (R, N), one row for each scale.
            candidates: number of factors tried, from 1 down to 0.2 of the one that reaches the row's largest magnitude.
            norm: p of the error, sum |x - x^|^p.
            symmetric: as in the class; None takes the format's own.

        Returns:
            (R,) scales, which are `storable`, and (R,) zero points or None.
        """
        largest = self.decode(torch.arange(2.0**self.bits, device=rows.device)).abs().amax().to(rows.dtype)
        reach = rows.abs().amax(1) / largest
        reach = torch.where(reach > 0, reach, torch.ones_like(reach))
        best, least = reach, torch.full_like(reach, torch.inf)
        for factor in torch.linspace(1.0, 0.2, candidates).tolist():
            scale = self.storable(reach * factor)
            quantized = self.nearest(rows / scale[:, None]) * scale[:, None]
            error = powers(quantized - rows, norm).sum(1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best, None

    def storable(self, scale: Tensor) -> Tensor:
        """Scales rounded to those that the artifact can hold."""
        return scale if self.scale_dtype is None else scale.to(self.scale_dtype).to(scale.dtype)


FORMATS: Registry[type[NumberFormat]] = Registry("number format")
"""By the name that `quantization.weight.format` takes."""


def make_format(name: str, bits: int, symmetric: bool = True) -> NumberFormat:
    """The number format of that name.

    Raises:
        UserError: there is none, or it lacks that width or symmetry.
    """
    return FORMATS[name](bits, symmetric, name)
