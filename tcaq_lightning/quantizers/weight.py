"""Weights: learned rounding while calibrating, codes afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tcaq_lightning.quantizers.adaround import initial_logits, soft_round
from tcaq_lightning.quantizers.base import Place, Quantizer, StoredTensor
from tcaq_lightning.quantizers.formats import NumberFormat
from tcaq_lightning.quantizers.packing import packed_size, unpack
from tcaq_lightning.quantizers.range_search import NORM

CLIPPED_LOGIT = -20.0
"""Rounded down for good: of a weight beyond the grid's ends, which has one code whatever its rounding."""
TIED_LOGIT = -1e-4
"""Rounded down, and as good as undecided: of a weight in the middle, if its format rounds that down."""


class Rounding(Enum):
    """How a weight is rounded now."""

    FLOAT = "full precision: statistics and targets"
    NEAREST = "to nearest, straight-through gradient: the r phase"
    SOFT = "floor + h(V): the V phase"
    HARD = "floor + [V >= 0]: the result"


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


class WeightQuantizer(Quantizer):
    """Maps r of a layer's input to the weight that meets it: W^ = (s w + o) / r, w being values of a format's grid.

    Attributes:
        number_format: what codes stand for.
        bits: code width.
        shape: of the weight, (O, I, ...).
        conv_groups: `groups` of the convolution.
        scale: one for each set of weights that share it; (O,) unless the format says otherwise.
        zero_point: of the scale's shape, or None where the format has none.
        offset: o of the scale's shape, or None where the format has none.
        outer: what stored scales are relative to, or None where they are not.
        learns: whether rounding is still learned; a frozen weight has `codes` alone.
    """

    place: ClassVar[Place] = "weight"
    learns: ClassVar[bool] = False
    number_format: NumberFormat
    shape: torch.Size
    conv_groups: int
    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None
    outer: Tensor | None

    @property
    def out_channels(self) -> int:
        """O."""
        return self.shape[0]

    @property
    def symmetric(self) -> bool:
        """Whether the zero points are those that a format has unless they are searched."""
        return self.zero_point is None or bool((self.zero_point == 2 ** (self.bits - 1)).all())

    def scales(self) -> Tensor:
        """Scale of the codes, differentiable in what is learned."""
        return self.scale

    def beside(self, values: Tensor, weight: Tensor) -> Tensor:
        """Values of the scale's shape beside a weight, to which they broadcast."""
        return self.number_format.sharing.spread(values, weight)

    def zeros(self, weight: Tensor) -> Tensor | None:
        """Zero points beside a weight, or None."""
        return None if self.zero_point is None else self.beside(self.zero_point, weight)

    def offsets(self, weight: Tensor) -> Tensor | None:
        """Offsets beside a weight, or None."""
        return None if self.offset is None else self.beside(self.offset, weight)


class AdaRoundWeight(WeightQuantizer):
    """A weight with learned rounding (docs/method.md, "Learned rounding").

    w^ = (s (a + h(V) (b - a)) + o) / r, where a and b are the neighbours of (W r - o) / delta on the format's grid:
    floor and ceiling within [low, high] for integers. The grid's step `delta` is fixed while V is learned, the scale s
    that codes are multiplied with starts at delta and may be learned, rounded to what can be stored.

    V takes the memory of another weight, so it is there only while its unit is worked on, from `open` to `settle`;
    of a settled weight a byte each is left beside the full-precision one, which is shared with the layer it comes from.

    Args:
        weight: (O, I, ...) in full precision.
        number_format: of its codes.
        conv_groups: `groups` of the convolution.

    Attributes:
        weight: the full-precision weight.
        delta: step of the grid, of the scale's shape.
        v: rounding logits of the weight's shape, or None, which rounds like logits of 0.
        settled: uint8 codes of the weight's shape, once the rounding is settled, or None.
        rounding: how the weight is rounded now.
    """

    kind: ClassVar[str] = "adaround"
    learns: ClassVar[bool] = True
    delta: Tensor
    v: Tensor | None
    settled: Tensor | None

    def __init__(self, weight: Tensor, number_format: NumberFormat, conv_groups: int = 1) -> None:
        super().__init__()
        self.number_format, self.bits = number_format, number_format.bits
        self.shape, self.conv_groups = weight.shape, conv_groups
        self.rounding = Rounding.HARD
        self.norm = NORM
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        dtype = torch.promote_types(weight.dtype, torch.float32)  # narrower ones are kept as they are, not computed in
        scales = number_format.sharing.shape(tuple(weight.shape))
        self.register_buffer("delta", torch.ones(scales, dtype=dtype, device=weight.device))
        self.register_buffer("scale", torch.ones_like(self.delta))
        zero_point = torch.full_like(self.delta, 2 ** (self.bits - 1)) if number_format.zero_points else None
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("offset", torch.zeros_like(self.delta) if number_format.offsets else None)
        outer = number_format.scale_type.outer_size(self.delta.numel())
        self.register_buffer("outer", self.delta.new_ones(outer) if outer else None)
        self.register_buffer("v", None)
        self.register_buffer("settled", None, persistent=False)
        self.log_scale: nn.Parameter | None = None
        self._base: Tensor | None = None
        self._gap: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """V, of a weight that is open."""
        assert self.v is not None
        return self.v

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Nothing can be stored yet.

        Raises:
            ValueError: always; `freeze` makes it a weight that can.
        """
        raise ValueError("a weight still learns its rounding; call freeze(denoiser) before")

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
        """Search the grid for W r, `r` being (C,) or (1,), and reset V: hardened rounding is rounding to nearest."""
        found = self.number_format.search(self.number_format.sharing.rows(self._scaled(r)), norm=self.norm)
        self.delta.copy_(found.scale.view_as(self.delta))
        if found.zero_point is not None and self.zero_point is not None:
            self.zero_point.copy_(found.zero_point.view_as(self.delta))
        if found.offset is not None and self.offset is not None:
            self.offset.copy_(found.offset.view_as(self.delta))
        if found.outer is not None and self.outer is not None:
            self.outer.copy_(found.outer)
        self.reset_rounding(r)

    @torch.no_grad()
    def nearest(self, r: Tensor) -> Tensor:
        """W r rounded to nearest on a quickly searched symmetric grid, divided by r: what candidates of r lead to."""
        factor = scale_of_inputs(r, self.weight, self.conv_groups)
        scaled = self.weight * factor
        rows = self.number_format.sharing.rows(scaled)
        found = self.number_format.search(rows, 12, norm=2, symmetric=True)
        step = self.beside(found.scale.view_as(self.delta), scaled)
        if found.offset is None:
            return self.number_format.fake_quantize(scaled, step) / factor
        offset = self.beside(found.offset.view_as(self.delta), scaled)
        return (self.number_format.fake_quantize(scaled - offset, step) + offset) / factor

    @torch.no_grad()
    def reset_rounding(self, r: Tensor) -> None:
        """V such that h(V) is where W r / delta lies between its neighbours, and s = delta."""
        self.open()
        scaled = self._in_steps(r)
        below, gap = self._neighbours(scaled)
        self.logits.copy_(initial_logits((scaled - below) if gap is None else (scaled - below) / gap))
        if not self.number_format.zero_points:  # integers round the middle up
            down = (self.logits >= 0) & (self.number_format.nearest(scaled) == below)
            self.logits.masked_fill_(down, TIED_LOGIT)
        self._clip(scaled)
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
                self._base, self._gap = self._clip(self._in_steps(r))
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
        self._base = self._gap = None
        self.rounding = Rounding.HARD

    def scales(self) -> Tensor:
        """Scale of the codes as it can be stored, differentiable in what is learned, straight through that rounding."""
        if self.log_scale is None:
            return self.scale
        scale = self.scale * self.log_scale.exp()
        if self.number_format.scale_type.is_exact:
            return scale
        return scale + (self.number_format.scale_type.storable(scale.detach(), self.outer) - scale.detach())

    @torch.no_grad()
    def codes(self, r: Tensor) -> Tensor:
        """Hardened integer codes, float-valued in [0, 2^b - 1], of the weight's shape; settled ones whatever `r` is."""
        if self.settled is not None:
            return self.settled.to(self.scale.dtype)
        up = None if self.v is None else self.v >= 0
        return self.number_format.rounded(self._in_steps(r), up, self.zeros(self.weight))

    def forward(self, r: Tensor) -> Tensor:
        """The weight as the layer meets it now; `r` is (C,) or (1,)."""
        if self.rounding is Rounding.FLOAT:
            return self.weight
        factor = scale_of_inputs(r, self.weight, self.conv_groups)
        scale, zero, offset = (
            self.beside(self.scales(), self.weight),
            self.zeros(self.weight),
            self.offsets(self.weight),
        )
        if self.rounding is Rounding.HARD:
            scaled = self.number_format.decode(self.codes(r), zero) * scale
            return (scaled if offset is None else scaled + offset) / factor
        if self.rounding is Rounding.NEAREST:
            scaled = self.weight * factor
            if offset is None:
                return self.number_format.fake_quantize(scaled, scale, zero) / factor
            return (self.number_format.fake_quantize(scaled - offset, scale, zero) + offset) / factor
        assert self._base is not None  # SOFT is entered by begin_learning alone
        unit = scale / factor
        rounded = soft_round(self.logits, self._base, unit if self._gap is None else unit * self._gap)
        return rounded if offset is None else rounded + offset / factor

    def _clip(self, scaled: Tensor) -> tuple[Tensor, Tensor | None]:
        """a / (b - a) and b - a of each weight, the latter None where it is 1; beyond the grid's ends V is settled."""
        below, above = self.number_format.neighbours(scaled, self.zeros(self.weight))
        self.logits.masked_fill_(below == above, CLIPPED_LOGIT)
        if self.number_format.uniform:
            return below, None
        gap = torch.where(below == above, 1.0, above - below)
        return below / gap, gap

    def _neighbours(self, scaled: Tensor) -> tuple[Tensor, Tensor | None]:
        """The neighbour below each weight and the distance to the one above, None where it is 1."""
        if self.number_format.uniform:
            return scaled.floor(), None
        below, above = self.number_format.neighbours(scaled, self.zeros(self.weight))
        clipped = below == above
        return torch.where(clipped, scaled, below), torch.where(clipped, 1.0, above - below)

    def _in_steps(self, r: Tensor) -> Tensor:
        scaled, offset = self._scaled(r), self.offsets(self.weight)
        return (scaled if offset is None else scaled - offset) / self.beside(self.delta, self.weight)

    def _scaled(self, r: Tensor) -> Tensor:
        return self.weight * scale_of_inputs(r, self.weight, self.conv_groups)


class CodedWeight(WeightQuantizer):
    """A finished weight: codes with their scales.

    Args:
        codes: (O, I, ...) uint8 in [0, 2^b - 1].
        scale: as it is stored, of the shape that the format's sharing says; (O,) for integers.
        zero_point: of the scale's shape, or None.
        number_format: what the codes stand for.
        conv_groups: `groups` of the convolution.
        offset: of the scale's shape, or None.
        outer: what the scales are stored relative to, or None.
    """

    kind: ClassVar[str] = "codes"
    codes: Tensor

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        number_format: NumberFormat,
        conv_groups: int = 1,
        offset: Tensor | None = None,
        outer: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self._describe(codes.shape, scale, zero_point, number_format, conv_groups, offset, outer)

    def _describe(
        self,
        shape: Sequence[int],
        scale: Tensor,
        zero_point: Tensor | None,
        number_format: NumberFormat,
        conv_groups: int,
        offset: Tensor | None,
        outer: Tensor | None,
    ) -> None:
        self.shape, self.conv_groups = torch.Size(shape), conv_groups
        self.number_format, self.bits = number_format, number_format.bits
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("offset", offset)
        self.register_buffer("outer", outer)

    @classmethod
    def from_rounded(cls, weight: AdaRoundWeight, r: Tensor) -> CodedWeight:
        """Harden a learned rounding."""
        codes = weight.codes(r).to(torch.uint8)
        scale = weight.number_format.scale_type.encode(weight.scale, weight.outer).clone()
        zero_point, offset, outer = (
            None if values is None else values.clone() for values in (weight.zero_point, weight.offset, weight.outer)
        )
        return cls(codes, scale, zero_point, weight.number_format, weight.conv_groups, offset, outer)

    @classmethod
    def neutral(cls, weight: Tensor, number_format: NumberFormat, conv_groups: int, symmetric: bool) -> CodedWeight:
        """For a weight of that shape; its codes are undefined, and so are zero points that are not symmetric."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scale, zero_point, *others = neutral_scales(weight, number_format, symmetric)
        return cls(codes, scale, zero_point, number_format, conv_groups, *others)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Packed codes, scales, and zero points unless they are symmetric."""
        return (StoredTensor("codes", self.codes, "codes", torch.uint8, self.bits), *self.stored_scales())

    def scales(self) -> Tensor:
        """Scale of the codes, in at least float32."""
        return self.number_format.scale_type.decode(self.scale, self.outer)

    def stored_scales(self) -> tuple[StoredTensor, ...]:
        """Scales and offsets, what scales are relative to, and zero points unless they are symmetric."""
        found = [StoredTensor.plain("scale", self.scale)]
        if self.zero_point is not None and not self.symmetric:
            found.append(StoredTensor("zero_point", self.zero_point, "zero_points", torch.uint8))
        if self.offset is not None:
            found.append(StoredTensor.plain("offset", self.offset, self.number_format.scale_type.dtype))
        if self.outer is not None:
            found.append(StoredTensor.plain("outer", self.outer))
        return tuple(found)

    def search(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the codes are found."""

    def begin_learning(self, *args: Any, **kwargs: Any) -> dict[str, list[nn.Parameter]]:
        """Nothing is learned of codes."""
        return {}

    def end_learning(self) -> None:
        """Does nothing."""

    def forward(self, r: Tensor) -> Tensor:
        """The dequantized weight for an input reparameterized by `r`, (C,) or (1,)."""
        codes, scale = self.codes, self.scales()
        factor, offset = scale_of_inputs(r, codes, self.conv_groups), self.offsets(codes)
        # In one piece of memory: to get three fresh ones from the system takes longer than to compute.
        weight = self.number_format.decode(codes.to(scale.dtype), self.zeros(codes)).mul_(self.beside(scale, codes))
        return (weight if offset is None else weight.add_(offset)).div_(factor)


class PackedWeight(CodedWeight):
    """A finished weight whose codes stay packed, as they are on disk, and are unpacked each time they are needed.

    Args:
        packed: (packed_size(numel, bits),) uint8.
        shape: of the codes.
        scale: as in `CodedWeight`.
        zero_point: likewise.
        number_format: likewise.
        conv_groups: likewise.
        offset: likewise.
        outer: likewise.
    """

    kind: ClassVar[str] = "packed"
    packed: Tensor

    def __init__(
        self,
        packed: Tensor,
        shape: Sequence[int],
        scale: Tensor,
        zero_point: Tensor | None,
        number_format: NumberFormat,
        conv_groups: int = 1,
        offset: Tensor | None = None,
        outer: Tensor | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.register_buffer("packed", packed)
        self._describe(shape, scale, zero_point, number_format, conv_groups, offset, outer)

    @classmethod
    def neutral(cls, weight: Tensor, number_format: NumberFormat, conv_groups: int, symmetric: bool) -> CodedWeight:
        """As in `CodedWeight`."""
        size = packed_size(weight.shape.numel(), number_format.bits)
        packed = torch.empty(size, dtype=torch.uint8, device=weight.device)
        scale, zero_point, *others = neutral_scales(weight, number_format, symmetric)
        return cls(packed, weight.shape, scale, zero_point, number_format, conv_groups, *others)

    @property
    def codes(self) -> Tensor:  # type: ignore[override]
        """(O, I, ...) uint8 in [0, 2^b - 1], made anew."""
        return unpack(self.packed, self.bits, self.shape.numel()).view(self.shape)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Codes as they are, scales, and zero points unless they are symmetric."""
        return (StoredTensor("packed", self.packed, "codes", torch.uint8), *self.stored_scales())


def neutral_scales(
    weight: Tensor, number_format: NumberFormat, symmetric: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Stored scales of 1, zero points, offsets and outer scales for a weight of that shape.

    Zero points that are about to be read are NaN.

    Args:
        weight: only its shape, type and device matter.
        number_format: what codes stand for.
        symmetric: whether the zero points are those of the format.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    one = torch.ones(number_format.sharing.shape(tuple(weight.shape)), dtype=dtype, device=weight.device)
    size = number_format.scale_type.outer_size(one.numel())
    outer = one.new_ones(size) if size else None
    offset = torch.zeros_like(one) if number_format.offsets else None
    point = 2 ** (number_format.bits - 1) if symmetric else torch.nan
    zero_point = torch.full_like(one, point) if number_format.zero_points else None
    return number_format.scale_type.encode(one, outer), zero_point, offset, outer
