"""Blocks of 32 integers as GGUF files hold them: Q8_0, Q4_0, Q5_0, and Q4_1, Q5_1 with a minimum."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from tcaq_lightning.quantizers.formats.base import FORMATS, Grid, NumberFormat, Sharing
from tcaq_lightning.quantizers.formats.scales import FloatScales
from tcaq_lightning.quantizers.range_search import NORM, powers


class IntegerBlocks(NumberFormat):
    """32 integers and a float16 scale, which may be negative.

    The end of the grid that is farther from 0 may be needed on either side.

    Attributes:
        lowest: smallest integer; the largest one is that of b bits.
        highest: largest integer.
        zero: the code of 0.
    """

    uniform: ClassVar[bool] = True
    sharing = Sharing(block=32)
    blocks: ClassVar[bool] = True
    scale_type = FloatScales(torch.float16)
    lowest: ClassVar[int]
    highest: ClassVar[int]
    zero: ClassVar[int]

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest integer."""
        return float(self.lowest), float(self.highest)

    def encode(self, values: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Integers from 0 on."""
        return values + self.zero

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """In the codes' memory."""
        return codes.sub_(self.zero)

    def neighbours(self, values: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Floor and ceiling within the ends."""
        below = values.floor()
        return below.clamp(self.lowest, self.highest), (below + 1).clamp_(self.lowest, self.highest)

    def nearest(self, values: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Rounded to nearest, ties to even."""
        return values.round().clamp_(self.lowest, self.highest)

    def tried(self, reach: Tensor, outer: Tensor | None, candidates: int) -> list[Tensor]:
        """Both signs, unless the grid is symmetric; nothing is clipped by the first of either."""
        if self.lowest == -self.highest:
            return super().tried(reach, outer, candidates)
        found = super().tried(reach * (self.largest / self.highest), outer, candidates // 2)
        return found + [-scale for scale in found]


@FORMATS.register("q8_0")
class Q8(IntegerBlocks):
    """Q8_0: -127..127 and a scale, 8.5 bits a value."""

    widths: ClassVar[range] = range(8, 9)
    lowest, highest, zero = -127, 127, 128


@FORMATS.register("q5_0")
class Q5(IntegerBlocks):
    """Q5_0: -16..15 and a scale, 5.5 bits a value."""

    widths: ClassVar[range] = range(5, 6)
    lowest, highest, zero = -16, 15, 16


@FORMATS.register("q4_0")
class Q4(IntegerBlocks):
    """Q4_0: -8..7 and a scale, 4.5 bits a value."""

    widths: ClassVar[range] = range(4, 5)
    lowest, highest, zero = -8, 7, 8


class OffsetBlocks(IntegerBlocks):
    """32 integers from 0 on, a float16 scale, and a float16 minimum that is added: w = d q + m."""

    offsets: ClassVar[bool] = True
    lowest, zero = 0, 0

    def search(self, rows: Tensor, candidates: int = 80, norm: float = NORM, symmetric: bool | None = None) -> Grid:
        """Best scale and minimum of every row.

        The row's range shrinks around its middle; what is found for the nearest integers by least squares is tried
        beside each range.
        """
        low, high = rows.amin(1), rows.amax(1)
        middle, width = (low + high) / 2, (high - low) / self.highest
        width = torch.where(width > 0, width, torch.ones_like(width))
        best = Grid(width, offset=low)
        least = torch.full_like(low, torch.inf)
        for factor in torch.linspace(1.0, 0.4, max(1, candidates // 4)).tolist():
            tried = self._storable(width * factor, middle - width * factor * self.highest / 2)
            for grid in (tried, self._refitted(rows, tried)):
                assert grid.offset is not None and best.offset is not None  # noqa: PT018 - narrows both
                scale, offset = grid.scale[:, None], grid.offset[:, None]
                quantized = self.nearest((rows - offset) / scale) * scale + offset
                error = powers(quantized - rows, norm).sum(1)
                better = error < least
                least = torch.where(better, error, least)
                best = Grid(
                    torch.where(better, grid.scale, best.scale), offset=torch.where(better, grid.offset, best.offset)
                )
        return best

    def _refitted(self, rows: Tensor, grid: Grid) -> Grid:
        """Scale and minimum with the least squared error for the integers that a grid rounds to."""
        assert grid.offset is not None
        codes = self.nearest((rows - grid.offset[:, None]) / grid.scale[:, None])
        mean_code, mean = codes.mean(1), rows.mean(1)
        moved = codes - mean_code[:, None]
        power = moved.square().sum(1)
        scale = (moved * rows).sum(1) / power.clamp(min=1e-6)
        scale = torch.where(scale > 0, scale, grid.scale)
        return self._storable(scale, mean - scale * mean_code)

    def _storable(self, scale: Tensor, offset: Tensor) -> Grid:
        largest = torch.finfo(torch.float16).max
        return Grid(self.scale_type.storable(scale), offset=offset.clamp(-largest, largest).half().to(offset.dtype))


@FORMATS.register("q5_1")
class Q5Offset(OffsetBlocks):
    """Q5_1: 0..31, a scale and a minimum, 6 bits a value."""

    widths: ClassVar[range] = range(5, 6)
    highest = 31


@FORMATS.register("q4_1")
class Q4Offset(OffsetBlocks):
    """Q4_1: 0..15, a scale and a minimum, 5 bits a value."""

    widths: ClassVar[range] = range(4, 5)
    highest = 15
