"""Blocks of floating-point numbers with narrow scales: the OCP Microscaling formats, and NVIDIA's NVFP4."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from tcaq_lightning.quantizers.formats.base import FORMATS, Sharing
from tcaq_lightning.quantizers.formats.floating import E2M1, E2M3, E3M2, E4M3, E5M2, FloatFormat
from tcaq_lightning.quantizers.formats.scales import GlobalScales, PowerOfTwoScales


class Microscaling(FloatFormat):
    """32 numbers and a power of two (OCP Microscaling Formats 1.0).

    The specification's scale clips the largest number of a block where that lies between the largest power of two and
    the largest number of the grid; twice that scale never does. Both are tried, and half of them.
    """

    sharing = Sharing(block=32)
    blocks: ClassVar[bool] = True
    scale_type = PowerOfTwoScales()

    def tried(self, reach: Tensor, outer: Tensor | None, candidates: int) -> list[Tensor]:
        """The power of two that clips nothing, and the three below it."""
        whole = reach.log2().ceil_()
        return [self.scale_type.storable(torch.exp2(whole - less)) for less in range(4)]


@FORMATS.register("mxfp8")
class MXFP8(Microscaling, E4M3):
    """MXFP8 of E4M3 numbers: 8.25 bits a value."""


@FORMATS.register("mxfp8_e5m2")
class MXFP8E5M2(Microscaling, E5M2):
    """MXFP8 of E5M2 numbers."""


@FORMATS.register("mxfp6")
class MXFP6(Microscaling, E2M3):
    """MXFP6 of E2M3 numbers: 6.25 bits a value."""


@FORMATS.register("mxfp6_e3m2")
class MXFP6E3M2(Microscaling, E3M2):
    """MXFP6 of E3M2 numbers."""


@FORMATS.register("mxfp4")
class MXFP4(Microscaling, E2M1):
    """MXFP4: 4.25 bits a value."""


@FORMATS.register("nvfp4")
class NVFP4(E2M1):
    """16 numbers of E2M1 with an E4M3 scale, and a float32 scale for the whole weight: 4.5 bits a value.

    Scales that bring a block's largest magnitude to 4 instead of 6 are among those tried, and may have less error.
    """

    sharing = Sharing(block=16)
    blocks: ClassVar[bool] = True
    scale_type = GlobalScales()
