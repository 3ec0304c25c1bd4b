"""Weights: learned rounding while calibrating, integers afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from tcaq_lightning.quantizers.adaround import initial_logits, soft_round
from tcaq_lightning.quantizers.packing import unpack
from tcaq_lightning.quantizers.range_search import search_affine, search_symmetric
from tcaq_lightning.quantizers.uniform import fake_quantize

CLIPPED_LOGIT = -20.0
"""Rounded down for good: of a weight beyond the grid's ends, which has one code whatever its rounding."""


class Rounding(Enum):
    """How a weight is rounded now."""

    FLOAT = "full precision: statistics and targets"
    NEAREST = "to nearest, straight-through gradient: the r phase"
    SOFT = "floor + h(V): the V phase"
    HARD = "floor + [V >= 0]: the result"


def dequantize(codes: Tensor, zero_point: Tensor, scale: Tensor, r: Tensor) -> Tensor:
    """W^ = scale (q - z) / r: the weight that meets an input whose channels were divided by r and multiplied back.

    Args:
        codes: (O, I, ...) codes q, any dtype.
        zero_point, scale: (O, 1, ...) per output channel.
        r: broadcastable to `codes`.
    """
    return (codes.to(scale.dtype) - zero_point) * scale / r


def column(values: Tensor, weight: Tensor) -> Tensor:
    """(O,) per-channel values as (O, 1, ...) beside a weight."""
    return values.view(-1, *[1] * (weight.ndim - 1))


def scale_of_inputs(r: Tensor, weight: Tensor, conv_groups: int = 1) -> Tensor:
    """r of a layer's input channels as a factor of its weight.

    Args:
        r: (C,) or (1,).
        weight: (O, C / conv_groups, ...).
        conv_groups: `groups` of the convolution.

    Returns:
        (1, C, 1, ...) or, for a grouped convolution, (O, C / conv_groups, 1, ...).
    """
    trailing = [1] * (weight.ndim - 2)
    if r.numel() == 1 or conv_groups == 1:
        return r.view(1, -1, *trailing)
    by_group = r.view(conv_groups, 1, -1).expand(-1, weight.shape[0] // conv_groups, -1)
    return by_group.reshape(weight.shape[0], -1, *trailing)


class AdaRoundWeight(nn.Module):
    """A weight with learned rounding (METHOD section 2).

    w^ = s clip(floor(W r / delta) + h(V), low, high) / r. The grid `delta` is fixed while V is learned, the scale s
    that codes are multiplied with starts at delta and may be learned.

    V takes the memory of another weight, so it is there only while its unit is worked on, from `open` to `settle`;
    of a settled weight a byte each is left beside the full-precision one, which is shared with the layer it comes from.

    Attributes:
        weight: the full-precision weight. delta, scale, zero_point: (O,).
        v: rounding logits of the weight's shape, or None, which rounds like logits of 0.
        settled: uint8 codes of the weight's shape, once the rounding is settled, or None.
    """

    delta: Tensor
    scale: Tensor
    zero_point: Tensor
    v: Tensor | None
    settled: Tensor | None

    def __init__(self, weight: Tensor, bits: int, symmetric: bool = True, conv_groups: int = 1) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = symmetric
        self.conv_groups = conv_groups
        self.rounding = Rounding.HARD
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        outputs = weight.shape[0]
        dtype = torch.promote_types(weight.dtype, torch.float32)  # narrower ones are kept as they are, not computed in
        self.register_buffer("delta", torch.ones(outputs, dtype=dtype, device=weight.device))
        self.register_buffer("scale", torch.ones_like(self.delta))
        self.register_buffer("zero_point", torch.full_like(self.delta, 2 ** (bits - 1)))
        self.register_buffer("v", None)
        self.register_buffer("settled", None, persistent=False)
        self.log_scale: nn.Parameter | None = None
        self._base: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """V, of a weight that is open."""
        assert self.v is not None
        return self.v

    def open(self) -> None:
        """Make room for rounding logits, which are 0 until they are set."""
        self.settled = None
        if self.v is None:
            self.v = torch.zeros_like(self.weight, dtype=self.delta.dtype)

    @torch.no_grad()
    def settle(self, r: Tensor) -> None:
        """Keep the hardened codes alone: the same bits come out, and nothing can be learned until V is set anew."""
        codes = self.codes(r).to(torch.uint8)
        self.v, self.settled = None, codes

    def discard_logits(self) -> None:
        """Forget V, and the codes of a settled weight."""
        self.v = self.settled = None

    @torch.no_grad()
    def search(self, r: Tensor) -> None:
        """Search the grid for W r and reset V, so that hardened rounding is rounding to nearest."""
        target = self._scaled(r)
        rows = target.flatten(1)
        if self.symmetric:
            self.delta.copy_(search_symmetric(rows, self.bits))
        else:
            delta, zero = search_affine(rows, self.bits)
            self.delta.copy_(delta)
            self.zero_point.copy_(zero)
        self.reset_rounding(r)

    @torch.no_grad()
    def reset_rounding(self, r: Tensor) -> None:
        """V such that h(V) is the fraction of W r / delta, and s = delta."""
        self.open()
        scaled = self._scaled(r) / column(self.delta, self.weight)
        self.logits.copy_(initial_logits(scaled - scaled.floor()))
        self._floor(scaled)
        self.scale.copy_(self.delta)

    def begin_learning(self, rounding: Rounding, r: Tensor) -> dict[str, list[nn.Parameter]]:
        """Enter the r phase (NEAREST) or the V phase (SOFT); returns the new parameters by kind."""
        self.rounding = rounding
        self.log_scale = nn.Parameter(torch.zeros_like(self.scale))
        learned = {"weight_scales": [self.log_scale]}
        if rounding is Rounding.SOFT:
            self.open()
            self.v = v = nn.Parameter(self._buffers.pop("v"))  # type: ignore[arg-type]
            learned["v"] = [v]
            with torch.no_grad():
                self._base = self._floor(self._scaled(r) / column(self.delta, self.weight))
        return learned

    @torch.no_grad()
    def end_learning(self) -> None:
        """Fold what was learned into the buffers and round hard."""
        scale = self.scales()
        self.log_scale = None
        self.scale.copy_(scale)
        if self.rounding is Rounding.SOFT:
            v = self._parameters.pop("v")
            assert v is not None
            self.register_buffer("v", v.detach())
        self._base = None
        self.rounding = Rounding.HARD

    def scales(self) -> Tensor:
        """(O,) scale of the codes, differentiable in what is learned."""
        return self.scale if self.log_scale is None else self.scale * self.log_scale.exp()

    @torch.no_grad()
    def codes(self, r: Tensor) -> Tensor:
        """Hardened integer codes, float-valued in [0, 2^b - 1], of the weight's shape; settled ones whatever `r` is."""
        if self.settled is not None:
            return self.settled.to(self.scale.dtype)
        base = torch.floor(self._scaled(r) / column(self.delta, self.weight))
        up = 1.0 if self.v is None else self.v >= 0
        return (base + up + column(self.zero_point, self.weight)).clamp_(0, 2**self.bits - 1)

    def forward(self, r: Tensor) -> Tensor:
        """The weight as the layer meets it now; `r` is (C,) or (1,)."""
        if self.rounding is Rounding.FLOAT:
            return self.weight
        factor = scale_of_inputs(r, self.weight, self.conv_groups)
        scale = column(self.scales(), self.weight)
        zero = column(self.zero_point, self.weight)
        if self.rounding is Rounding.HARD:
            return dequantize(self.codes(r), zero, scale, factor)
        if self.rounding is Rounding.NEAREST:
            return fake_quantize(self.weight * factor, scale, -zero, 2**self.bits - 1 - zero) / factor
        assert self._base is not None  # SOFT is entered by begin_learning alone
        return soft_round(self.logits, self._base, scale / factor)

    def _floor(self, scaled: Tensor) -> Tensor:
        """W r / delta rounded down, within the grid; where it leaves the grid, V is settled."""
        base = scaled.floor()
        low = -column(self.zero_point, self.weight)
        high = 2**self.bits - 1 + low
        self.logits.masked_fill_((base < low) | (base >= high), CLIPPED_LOGIT)
        return base.clamp_(low, high)

    def _scaled(self, r: Tensor) -> Tensor:
        return self.weight * scale_of_inputs(r, self.weight, self.conv_groups)


class IntegerWeight(nn.Module):
    """A finished weight: integer codes with a scale for each output channel.

    Attributes:
        codes: (O, I, ...) uint8 in [0, 2^b - 1]. scale, zero_point: (O,).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, conv_groups: int = 1) -> None:
        super().__init__()
        self.bits = bits
        self.conv_groups = conv_groups
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def scales(self) -> Tensor:
        """(O,) scale of the codes."""
        return self.scale

    @classmethod
    def from_rounded(cls, weight: AdaRoundWeight, r: Tensor) -> IntegerWeight:
        """Harden a learned rounding."""
        codes = weight.codes(r).to(torch.uint8)
        return cls(codes, weight.scale.clone(), weight.zero_point.clone(), weight.bits, weight.conv_groups)

    def forward(self, r: Tensor) -> Tensor:
        """The dequantized weight for an input reparameterized by `r`, (C,) or (1,)."""
        codes = self.codes
        factor = scale_of_inputs(r, codes, self.conv_groups)
        # `dequantize` in one piece of memory: to get three fresh ones from the system takes longer than to compute.
        weight = codes.to(self.scale.dtype).sub_(column(self.zero_point, codes))
        return weight.mul_(column(self.scale, codes)).div_(factor)


class PackedWeight(IntegerWeight):
    """An integer weight whose codes stay packed, as they are on disk, and are unpacked each time they are needed.

    Attributes:
        packed: (packed_size(numel, bits),) uint8. shape: of the codes.
    """

    packed: Tensor

    def __init__(
        self,
        packed: Tensor,
        shape: Sequence[int],
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        conv_groups: int = 1,
    ) -> None:
        nn.Module.__init__(self)
        self.shape, self.bits, self.conv_groups = torch.Size(shape), bits, conv_groups
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @property
    def codes(self) -> Tensor:  # type: ignore[override]
        """(O, I, ...) uint8 in [0, 2^b - 1], made anew."""
        return unpack(self.packed, self.bits, self.shape.numel()).view(self.shape)
