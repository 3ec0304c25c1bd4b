"""Tables of levels: formats whose grid is a list of values."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from tcaq_lightning.quantizers.formats.base import NumberFormat


class LevelTable(NumberFormat):
    """Codes number the levels of a table, from the lowest on: the shortest way to a format of one's own.

    >>> class Ternary(LevelTable):
    ...     def levels(self) -> list[float]:
    ...         return [-1.0, 0.0, 1.0]
    >>> Ternary(2).nearest(torch.tensor([-3.0, -0.4, 0.6]))
    tensor([-1.,  0.,  1.])
    """

    @abstractmethod
    def levels(self) -> list[float]:
        """At most 2^b ascending values, 0 among them (zeros of a weight should stay zero)."""

    def encode(self, values: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The number of the level that is each value."""
        return torch.bucketize(values, self._table(values)).to(values.dtype)

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The level of each number; of a number beyond the table its last one."""
        table = self._table(codes)
        return table[codes.long().clamp_(max=len(table) - 1)]

    def neighbours(self, values: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The levels around each value."""
        table = self._table(values)
        after = torch.bucketize(values, table, right=True)  # number of the first level above
        below = table[(after - 1).clamp_(min=0)]
        return below, torch.where(values < table[0], below, table[after.clamp(max=len(table) - 1)])

    def nearest(self, values: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The nearest level, the lower one of two."""
        table = self._table(values)
        return table[torch.bucketize(values, (table[1:] + table[:-1]) / 2)]

    def _table(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.levels())
