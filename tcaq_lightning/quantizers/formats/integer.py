"""Integers: the grid c - z of codes c in 0..2^b - 1, with scales and zero points."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from tcaq_lightning.quantizers.formats.base import FORMATS, Grid, NumberFormat
from tcaq_lightning.quantizers.range_search import NORM, search_affine, search_symmetric
from tcaq_lightning.quantizers.uniform import fake_quantize


@FORMATS.register("int")
class IntegerFormat(NumberFormat):
    """INT2..INT8, symmetric with the zero point 2^(b-1), or with a searched one (docs/method.md, "Quantizers").

    >>> IntegerFormat(2).neighbours(torch.tensor([-9.0, 0.25, 9.0]), torch.tensor(2.0))
    (tensor([-2.,  0.,  1.]), tensor([-2.,  1.,  1.]))
    """

    uniform: ClassVar[bool] = True
    zero_points: ClassVar[bool] = True

    def encode(self, values: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """c = w + z."""
        return values + self._zero(zero_point)

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """c - z, in the codes' memory."""
        return codes.sub_(self._zero(zero_point))

    def neighbours(self, values: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Floor and ceiling within [-z, 2^b - 1 - z]."""
        low, high = self._ends(zero_point, values)
        below = values.floor()
        above = torch.minimum(torch.maximum(below + 1, low), high)
        return torch.minimum(torch.maximum(below, low, out=below), high, out=below), above

    def rounded(self, values: Tensor, up: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
        """clip(floor(w) + up + z, 0, 2^b - 1)."""
        moved = values.floor() + (1.0 if up is None else up)
        return (moved + self._zero(zero_point)).clamp_(0, 2**self.bits - 1)

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """By the compiled kernel."""
        return fake_quantize(x, scale, *self._ends(zero_point, scale))

    def search(
        self, rows: Tensor, candidates: int | None = None, norm: float = NORM, symmetric: bool | None = None
    ) -> Grid:
        """Best step of every row, and its zero point if that is not constant; 80 or 16 candidates by default."""
        if self.symmetric if symmetric is None else symmetric:
            return Grid(search_symmetric(rows, self.bits, candidates or 80, norm))
        return Grid(*search_affine(rows, self.bits, candidates or 16, norm=norm))

    def _zero(self, zero_point: Tensor | None) -> Tensor | float:
        return 2.0 ** (self.bits - 1) if zero_point is None else zero_point

    def _ends(self, zero_point: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        zero = like.new_tensor(2.0 ** (self.bits - 1)) if zero_point is None else zero_point
        return -zero, 2**self.bits - 1 - zero
