"""The contract of number formats: what the codes of a weight stand for, and which of them share a scale."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tcaq_lightning.errors import UserError
from tcaq_lightning.quantizers.formats.scales import ScaleType
from tcaq_lightning.quantizers.range_search import NORM, powers
from tcaq_lightning.runtime.registry import Registry


@dataclass(frozen=True)
class Sharing:
    """Which values of a weight (O, I, ...) share a scale; by default those of an output channel.

    Attributes:
        group: so many neighbouring inputs of an output channel share one, the last ones what is left; None: all of it.
        whole: whether one scale is everybody's.
        block: so many neighbouring values of an output channel, kernel positions counted, share one; the last ones
            what is left.

    >>> Sharing().shape((4, 6, 3, 3)), Sharing(group=2).shape((4, 6, 3, 3)), Sharing(whole=True).shape((4, 6))
    ((4,), (4, 3), (1,))
    >>> Sharing(block=16).shape((4, 6, 3, 3))
    (4, 4)
    """

    group: int | None = None
    whole: bool = False
    block: int | None = None

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a weight of that shape."""
        if self.whole:
            return (1,)
        if self.block is not None:
            return weight[0], -(-math.prod(weight[1:]) // self.block)
        return weight[:1] if self.group is None else (weight[0], -(-weight[1] // self.group))

    def rows(self, weight: Tensor) -> Tensor:
        """(R, N): the values of each scale in a row, in the scales' order; what is missing of a last group is 0."""
        if self.whole:
            return weight.reshape(1, -1)
        if self.group is None and self.block is None:
            return weight.flatten(1)
        values = weight if self.block is None else weight.flatten(1)
        together = self.block or self.group or 1
        missing = -values.shape[1] % together
        padded = torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], dim=1)
        return torch.unflatten(padded, 1, (-1, together)).flatten(0, 1).flatten(1)

    def spread(self, scales: Tensor, weight: Tensor) -> Tensor:
        """Scales of `shape` beside a weight, to which they broadcast."""
        if self.block is not None:
            beside = scales[:, :, None].expand(-1, -1, self.block).flatten(1)  # (O, K), the last block whole
            return beside[:, : weight.shape[1:].numel()].reshape(weight.shape)
        if self.group is None:
            return scales.view(-1, *[1] * (weight.ndim - 1))
        beside = scales.repeat_interleave(self.group, dim=1)[:, : weight.shape[1]]  # (O, I)
        return beside.view(*beside.shape, *[1] * (weight.ndim - 2))


GRANULARITIES = {"channel": Sharing(), "tensor": Sharing(whole=True)}
"""What `quantization.weight.granularity` may be, beside a number of inputs."""


class Grid(NamedTuple):
    """What a search finds for each row, all (R,): w = scale g + offset with values g of the grid.

    Attributes:
        scale: as it can be stored.
        zero_point: of formats whose grid is moved by whole codes, else None.
        offset: of formats that add one to weights, else None.
        outer: what the scales are stored relative to, or None.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    offset: Tensor | None = None
    outer: Tensor | None = None


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
        granularity: which values share a scale: channel, tensor, or a number of neighbouring inputs; None is the
            format's own.

    Raises:
        UserError: a width, symmetry or granularity that the format does not have.

    Attributes:
        widths: code widths that it has, within 2..8.
        uniform: whether neighbouring grid values are 1 apart.
        zero_points: whether grids are moved by zero points.
        offsets: whether an offset is added to weights beside their scale.
        sharing: which values share a scale; of a class, unless `granularity` says otherwise.
        blocks: whether the sharing is part of the format.
        scale_type: what scales are stored as.
    """

    widths: ClassVar[range] = range(2, 9)
    uniform: ClassVar[bool] = False
    zero_points: ClassVar[bool] = False
    offsets: ClassVar[bool] = False
    sharing: Sharing = Sharing()
    blocks: ClassVar[bool] = False
    scale_type: ClassVar[ScaleType] = ScaleType()
    factors: ClassVar[tuple[float, float]] = (1.0, 0.2)
    """Ends of the factors that a search tries, of the scale that reaches a row's largest magnitude."""

    def __init__(self, bits: int, symmetric: bool = True, name: str = "", granularity: int | str | None = None) -> None:
        self.name = kind = name or type(self).__name__
        if bits not in self.widths:
            first, last = self.widths[0], self.widths[-1]
            expected = f"{first}" if first == last else f"in {first}..{last}"
            raise UserError(
                f"quantization.weight.bits must be {expected} for quantization.weight.format {kind}, got {bits}"
            )
        if not (symmetric or self.zero_points):
            raise UserError(
                f"quantization.weight.symmetric must be true for quantization.weight.format {kind}, which has no zero "
                "points, got false"
            )
        if granularity is not None and self.blocks:
            raise UserError(
                f"quantization.weight.granularity must be null for quantization.weight.format {kind}, whose scales are "
                f"part of the format, got {granularity!r}"
            )
        if granularity is not None:
            self.sharing = Sharing(group=granularity) if isinstance(granularity, int) else GRANULARITIES[granularity]
        self.bits, self.symmetric, self.granularity = bits, symmetric, granularity

    @property
    def integers(self) -> bool:
        """Whether integer kernels of engines can multiply it: values c - z with a scale for each output channel."""
        return self.uniform and self.zero_points and self.sharing == Sharing()

    @cached_property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest value of the grid, of one without zero points."""
        grid = self.decode(torch.arange(2.0**self.bits))
        grid = grid[grid.isfinite()]
        return float(grid.amin()), float(grid.amax())

    @property
    def largest(self) -> float:
        """Largest magnitude of the grid."""
        return max(map(abs, self.ends))

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
            scale: not 0, broadcastable to `x`.
            zero_point: likewise, or None.
        """
        steps = x / scale
        with torch.no_grad():
            grid = self.nearest(steps, zero_point)
            if zero_point is None:
                outside = (steps < self.ends[0]) | (steps > self.ends[1])
            else:
                outside = torch.eq(*self.neighbours(steps, zero_point))
        moving = torch.where(outside, steps.detach(), steps)
        return (grid + (moving - moving.detach())) * scale

    def search(self, rows: Tensor, candidates: int = 80, norm: float = NORM, symmetric: bool | None = None) -> Grid:
        """Best scale of every row: of several, the one with the least error.

        Args:
            rows: (R, N), one row for each scale.
            candidates: number of scales tried, between `factors` of the one that reaches the row's largest magnitude.
            norm: p of the error, sum |x - x^|^p.
            symmetric: as in the class; None takes the format's own.

        Returns:
            Scales that can be stored, and what they are stored relative to.
        """
        reach = rows.abs().amax(1) / self.largest
        highest = reach.amax()
        reach = torch.where(reach > 0, reach, highest if highest > 0 else torch.ones_like(highest))
        outer = self.scale_type.outer(reach)
        best, least = reach, torch.full_like(reach, torch.inf)
        for scale in self.tried(reach, outer, candidates):
            quantized = self.nearest(rows / scale[:, None]) * scale[:, None]
            error = powers(quantized - rows, norm).sum(1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return Grid(best, outer=outer)

    def tried(self, reach: Tensor, outer: Tensor | None, candidates: int) -> list[Tensor]:
        """Scales that a search compares, (R,) each, which can be stored; `reach` reaches a row's largest magnitude."""
        factors = torch.linspace(*self.factors, candidates).tolist()
        return [self.scale_type.storable(reach * factor, outer) for factor in factors]

    def bits_per_weight(self, weight: tuple[int, ...]) -> float:
        """Bits that the file holds for a value of a weight of that shape, scales and offsets counted.

        >>> from tcaq_lightning.quantizers import make_format
        >>> [make_format(name, 4).bits_per_weight((64, 256)) for name in ("mxfp4", "nvfp4", "q4_0", "q4_1")]
        [4.25, 4.501953125, 4.5, 5.0]
        """
        count = math.prod(self.sharing.shape(weight))
        width = 8 * (self.scale_type.dtype or torch.float32).itemsize
        parts = 2 if self.offsets else 1
        points = 8 * count if self.zero_points and not self.symmetric else 0
        outer = 32 * self.scale_type.outer_size(count)
        return self.bits + (parts * width * count + points + outer) / math.prod(weight)


FORMATS: Registry[type[NumberFormat]] = Registry("number format")
"""By the name that `quantization.weight.format` takes."""


def make_format(name: str, bits: int, symmetric: bool = True, granularity: int | str | None = None) -> NumberFormat:
    """The number format of that name.

    Raises:
        UserError: there is none, or it lacks that width, symmetry or granularity.
    """
    return FORMATS[name](bits, symmetric, name, granularity)
