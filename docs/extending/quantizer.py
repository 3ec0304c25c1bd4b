"""A number format of one's own: weights that are powers of two, with a scale for every sixteen inputs of a channel."""

from __future__ import annotations

from typing import ClassVar

from tcaq_lightning.quantizers import FORMATS, LevelTable, Sharing


@FORMATS.register("pow2")
class PowersOfTwo(LevelTable):
    """0 and +-1, +-1/2, +-1/4, ... in steps of the scale: products with such weights are shifts."""

    widths: ClassVar[range] = range(2, 5)
    sharing: ClassVar[Sharing] = Sharing(group=16)

    def levels(self) -> list[float]:
        """2^b - 1 ascending values."""
        positive = [2.0**-k for k in range(2 ** (self.bits - 1) - 1)]
        return [-value for value in positive] + [0.0, *reversed(positive)]
