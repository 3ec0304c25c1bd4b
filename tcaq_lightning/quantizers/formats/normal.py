"""NF4: quantiles of a normal distribution (Dettmers et al. 2023, QLoRA)."""

from __future__ import annotations

from typing import ClassVar

from tcaq_lightning.quantizers.formats.base import FORMATS, Sharing
from tcaq_lightning.quantizers.formats.levels import LevelTable
from tcaq_lightning.quantizers.formats.scales import QuantizedScales

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""QLoRA, appendix E."""


@FORMATS.register("nf4")
class NF4(LevelTable):
    """64 values share a scale, and 256 scales are quantized together to 8 bits: 4.127 bits a value."""

    widths: ClassVar[range] = range(4, 5)
    sharing = Sharing(block=64)
    blocks: ClassVar[bool] = True
    scale_type = QuantizedScales()
    factors: ClassVar[tuple[float, float]] = (1.0, 0.6)

    def levels(self) -> list[float]:
        """16 ascending quantiles."""
        return list(LEVELS)
