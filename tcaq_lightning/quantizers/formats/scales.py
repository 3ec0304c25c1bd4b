"""Types of scales: what the scales of a number format are stored as."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXPONENT_BIAS = 127
"""Of E8M0."""
E4M3_LARGEST = 448.0
E4M3_SMALLEST = 2.0**-9
"""Ends of the positive values of E4M3."""


class ScaleType:
    """Scales as they are computed, in float32: the type of formats that say nothing else.

    A type stores scales in `dtype`, some relative to `outer` ones, which are found once and are part of the artifact.

    Attributes:
        dtype: of the stored scales, or None for that in which they are computed.
    """

    dtype: torch.dtype | None = None

    @property
    def is_exact(self) -> bool:
        """Whether every scale can be stored."""
        return self.dtype is None

    def outer_size(self, count: int) -> int:
        """Number of outer scales for so many scales."""
        return 0

    def outer(self, scales: Tensor) -> Tensor | None:
        """(outer_size,) what scales like these are stored relative to; None if to nothing."""
        return None

    def encode(self, scales: Tensor, outer: Tensor | None = None) -> Tensor:
        """What is stored of scales, in `dtype` and their shape: the nearest that it can hold and that is not 0."""
        return scales

    def decode(self, stored: Tensor, outer: Tensor | None = None) -> Tensor:
        """The scales of what is stored, in their shape and at least float32."""
        return stored

    def storable(self, scales: Tensor, outer: Tensor | None = None) -> Tensor:
        """Scales rounded to those that can be stored."""
        return scales if self.is_exact else self.decode(self.encode(scales, outer), outer).to(scales.dtype)


class FloatScales(ScaleType):
    """Scales in a narrower floating type; negative ones stay negative.

    Args:
        dtype: float16 or bfloat16.

    >>> FloatScales(torch.float16).storable(torch.tensor([0.1, 1e-12, -1e9]))
    tensor([ 1.0e-01, 6.0e-08, -6.6e+04])
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        info = torch.finfo(dtype)
        self.smallest, self.largest = info.smallest_normal * info.eps, info.max

    def encode(self, scales: Tensor, outer: Tensor | None = None) -> Tensor:
        """Rounded to nearest."""
        magnitude = scales.abs().clamp(self.smallest, self.largest)
        return magnitude.copysign(scales).to(self.dtype)

    def decode(self, stored: Tensor, outer: Tensor | None = None) -> Tensor:
        """In float32."""
        return stored.to(torch.float32)


class PowerOfTwoScales(ScaleType):
    """E8M0, a power of two as its exponent plus 127 in a byte (OCP Microscaling Formats 1.0, section 5.4.1).

    >>> PowerOfTwoScales().encode(torch.tensor([1.0, 0.25, 3.0]))
    tensor([127, 125, 129], dtype=torch.uint8)
    """

    dtype = torch.uint8

    def encode(self, scales: Tensor, outer: Tensor | None = None) -> Tensor:
        """The nearest exponent; 0, 2^-127, is left out, which is no normal number in float32."""
        return scales.log2().round_().add_(EXPONENT_BIAS).clamp_(1, 2 * EXPONENT_BIAS).to(torch.uint8)

    def decode(self, stored: Tensor, outer: Tensor | None = None) -> Tensor:
        """2^(stored - 127)."""
        return torch.exp2(stored.to(torch.float32) - EXPONENT_BIAS)


class GlobalScales(ScaleType):
    """E4M3 relative to one float32 scale for the whole weight, as NVFP4 has them.

    The outer scale is such that the largest one becomes 448, the largest value of E4M3.
    """

    dtype = torch.float8_e4m3fn

    def outer_size(self, count: int) -> int:
        """One."""
        return 1

    def outer(self, scales: Tensor) -> Tensor:
        """(1,) largest scale / 448."""
        return (scales.amax() / E4M3_LARGEST).clamp(min=torch.finfo(torch.float32).tiny).reshape(1)

    def encode(self, scales: Tensor, outer: Tensor | None = None) -> Tensor:
        """Rounded to nearest, ties to even."""
        assert outer is not None
        return (scales / outer).clamp_(E4M3_SMALLEST, E4M3_LARGEST).to(torch.float8_e4m3fn)

    def decode(self, stored: Tensor, outer: Tensor | None = None) -> Tensor:
        """Stored times the outer one."""
        assert outer is not None
        return stored.to(torch.float32) * outer


class QuantizedScales(ScaleType):
    """Double quantization: 8-bit integers around the mean of all scales (Dettmers et al. 2023, QLoRA, section 3).

    s = q / f + m with a factor f for each `together` scales and one m for all. The outer scales are the factors and m.

    Args:
        together: scales that share a factor, in their order.
    """

    dtype = torch.int8

    def __init__(self, together: int = 256) -> None:
        self.together = together

    def outer_size(self, count: int) -> int:
        """Factors, and the mean."""
        return math.ceil(count / self.together) + 1

    def outer(self, scales: Tensor) -> Tensor:
        """Factors that spread each group over 256 codes, and the mean."""
        mean = scales.mean()
        reach = self._groups(scales - mean).abs().amax(1)
        factors = 256 / (2 * torch.where(reach > 0, reach, torch.ones_like(reach)))
        return torch.cat([factors, mean.reshape(1)])

    def encode(self, scales: Tensor, outer: Tensor | None = None) -> Tensor:
        """Rounded to nearest among the codes that stand for something positive."""
        factors, mean = self._spread(outer, scales)
        least = (-mean * factors).floor().add_(1)
        codes = ((scales - mean) * factors).round_()
        return torch.maximum(codes, least).clamp_(-128, 127).to(torch.int8)

    def decode(self, stored: Tensor, outer: Tensor | None = None) -> Tensor:
        """q / f + m."""
        factors, mean = self._spread(outer, stored)
        return stored / factors + mean

    def _groups(self, scales: Tensor) -> Tensor:
        flat = scales.reshape(-1)
        return torch.nn.functional.pad(flat, (0, -flat.numel() % self.together)).view(-1, self.together)

    def _spread(self, outer: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        assert outer is not None
        return outer[:-1].repeat_interleave(self.together)[: like.numel()].view(like.shape), outer[-1]
