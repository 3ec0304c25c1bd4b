"""Quantizers of activations: per tensor, one step and zero point for each timestep group, r for each channel."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tcaq_lightning.quantizers.base import Quantizer, StoredTensor
from tcaq_lightning.quantizers.observers import RangeStatistics
from tcaq_lightning.quantizers.range_search import NORM, search_affine, search_common_zero
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups, some_positions
from tcaq_lightning.quantizers.uniform import fake_quantize
from tcaq_lightning.runtime.precision import autocast_type
from tcaq_lightning.runtime.registry import Registry

VALUES = 4096
"""Values per timestep group in a range search."""


def of_groups(table: Tensor, groups: Tensor) -> Tensor:
    """Rows of a (G, ...) table for a batch, (B, ...).

    Args:
        table: (G, ...).
        groups: (B,) timestep groups, on any device.
    """
    here = groups.get_device() == table.get_device()  # asked so, it takes a fifth of the time
    return table.index_select(0, groups if here else groups.to(table.device))


def per_sample(table: Tensor, groups: Tensor, dims: int) -> Tensor:
    """Rows of a (G,) table for a batch: (B, 1, ..., 1) with `dims` axes.

    Args:
        table: (G,).
        groups: (B,) timestep groups.
        dims: axes of the result.
    """
    return of_groups(table, groups).view(-1, *[1] * (dims - 1))


def for_all_samples(x: Tensor, rows: int) -> Tensor:
    """A single row stands for all samples, such as one timestep's embedding: (1, ...) as (rows, ...)."""
    return x.expand(rows, *x.shape[1:]) if x.shape[0] == 1 < rows else x


def along(values: Tensor, dims: int, channel_dim: int) -> Tensor:
    """(C,) values beside a tensor of `dims` axes with its channels on `channel_dim`.

    Args:
        values: (C,).
        dims: axes of the result.
        channel_dim: its axis of channels.
    """
    shape = [1] * dims
    shape[channel_dim] = -1
    return values.view(shape)


def widened(x: Tensor) -> Tensor:
    """In float32 where the type is narrower, unless autocast is to choose: what is searched or summed needs it."""
    return x if autocast_type(x) is not None else x.to(torch.promote_types(x.dtype, torch.float32))


class ActivationQuantizer(Quantizer):
    """Uniform affine quantizer of one tensor, reparameterized by channel (docs/method.md, "Quantizers" and "TCR").

    x^ = r_d s_g (clip(round(x / (r_d s_g)) + z_g, 0, 2^b - 1) - z_g): the division by r and the multiplication back
    (which real kernels find in the weights) are one step of r_d s_g, so TCR costs nothing here. Where the layer is
    pointwise, x is x - shift, and the layer adds what the shift contributes (channel shifting of Outlier Suppression+,
    Wei et al. 2023): with padding, zeros would have to be shifted too.

    A subclass, registered under its `kind`, changes `forward` and what is searched, learned and stored.

    Args:
        bits: code width b.
        groups: timestep groups of the denoiser.
        channels: C, or 1 where nothing is reparameterized.
        channel_dim: axis of the channels.

    Attributes:
        delta: (G,) steps s.
        zero_point: (G,) integer-valued.
        r: (C,), all ones where TCR is off.
        shift: (C,) centres of the channels' ranges, or None where they stay.
        log_delta: relative change of the steps while it is learned; None outside of a fit.
        log_r: that of r, likewise.
        enabled: off while statistics are taken.
        norm: p of the error that a search minimises.
        headroom: factor on searched ranges. Other than 1 nothing is learned, since learning would take it away.
        constant_zero: whether all groups must have one zero point.
        drop_probability: QDrop's share of elements that stay in full precision during a fit (Wei et al. 2022).
    """

    kind: ClassVar[str] = "uniform"
    place: ClassVar[Literal["input"]] = "input"
    delta: Tensor
    zero_point: Tensor
    r: Tensor
    shift: Tensor | None

    def __init__(self, bits: int, groups: TimestepGroups, channels: int = 1, channel_dim: int = -1) -> None:
        super().__init__()
        self.bits = bits
        self.groups = groups
        self.channel_dim = channel_dim
        self.enabled = True
        self.headroom = 1.0
        self.norm = NORM
        self.constant_zero = False
        self.drop_probability = 0.0
        self.register_buffer("delta", torch.ones(groups.num_groups))
        self.register_buffer("zero_point", torch.zeros(groups.num_groups))
        self.register_buffer("r", torch.ones(channels))
        self.register_buffer("shift", None)
        self.log_delta: nn.Parameter | None = None
        self.log_r: nn.Parameter | None = None

    def allow_shift(self) -> None:
        """Give the quantizer a shift, zero until it is set; every layer that reads it must be pointwise."""
        self.register_buffer("shift", torch.zeros_like(self.r))

    def centred(self, x: Tensor) -> Tensor:
        """x - shift."""
        return x if self.shift is None else x - along(self.shift, x.ndim, self.channel_dim)

    @property
    def reparameterized(self) -> bool:
        """Whether some r is not 1; of a single one, nothing is asked."""
        return self.r.numel() > 1 and bool((self.r != 1).any())

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Steps, zero points, the shift, and r unless it is 1 everywhere."""
        found = [
            StoredTensor.plain("delta", self.delta),
            StoredTensor("zero_point", self.zero_point, "zero_points", torch.uint8),
        ]
        return (*found, *self.stored_channels())

    def stored_channels(self) -> tuple[StoredTensor, ...]:
        """The shift, and r unless it is 1 everywhere."""
        found = [StoredTensor.plain("r", self.r)] if self.reparameterized else []
        if self.shift is not None:
            found.append(StoredTensor("shift", self.shift, "shifts", torch.float16))
        return tuple(found)

    @torch.no_grad()
    def search(
        self, x: Tensor, ranges: RangeStatistics, values: int = VALUES, candidates: int = 16, norm: float | None = None
    ) -> None:
        """Search step and zero point of (x - shift) / r for every group.

        Args:
            x: (B, ...) probes in full precision, sorted by timestep group with equal counts.
            ranges: of each channel in each group, over all samples.
            values: per group that errors are summed over.
            candidates: shrink factors tried for an end of a range.
            norm: p of the error; None takes the quantizer's own.
        """
        norm = self.norm if norm is None else norm
        if self.shift is not None:
            ranges = ranges.shifted(self.shift.cpu())
        low, high = (limit.to(x.device) for limit in ranges.limits(self.r.cpu()))
        rows = self.scaled_by_group(x, ranges.low.shape[0], values)
        delta, zero = search_affine(rows, self.bits, candidates, (low, high), norm)
        if self.constant_zero and bool((zero != zero[0]).any()):
            delta, zero = search_common_zero(rows, self.bits, zero, candidates, (low, high), norm)
        self.delta.copy_(delta * self.headroom)
        self.zero_point.copy_(zero)

    def scaled_by_group(self, x: Tensor, num_groups: int, values: int) -> Tensor:
        """(G, n) `values_by_group` of (x - shift) / r, computed for those values alone."""
        rows = x.reshape(num_groups, -1)
        positions = some_positions(rows.shape[1], values)
        count, rows = rows.shape[1], rows[:, positions]
        if self.shift is None and self.r.numel() == 1:
            return rows
        numbers = torch.arange(num_groups)[:, None] * count  # of the values in all of x
        numbers = numbers + (torch.arange(count) if isinstance(positions, slice) else positions)
        inner = math.prod(x.shape[self.channel_dim % x.ndim + 1 :])
        channels = (numbers // inner % self.r.numel()).to(x.device)
        if self.shift is not None:
            rows = rows - self.shift[channels]
        return rows / self.r[channels]

    def begin_learning(
        self, reparameterize: bool = False, drop_probability: float = 0.0
    ) -> dict[str, list[nn.Parameter]]:
        """Make the steps, and r if asked, learnable; returns the new parameters by kind.

        Args:
            reparameterize: whether r is learned.
            drop_probability: QDrop's share while learning.
        """
        self.drop_probability = drop_probability
        if self.headroom != 1:
            return {}
        self.log_delta = nn.Parameter(torch.zeros_like(self.delta))
        return {"steps": [self.log_delta], **(self.learned_scales() if reparameterize else {})}

    def learned_scales(self) -> dict[str, list[nn.Parameter]]:
        """Make r learnable; nothing if there is a single one."""
        if self.r.numel() == 1:
            return {}
        self.log_r = nn.Parameter(torch.zeros_like(self.r))
        return {"r": [self.log_r]}

    @torch.no_grad()
    def end_learning(self) -> None:
        """Fold what was learned into `delta` and `r`, and drop nothing anymore."""
        self.drop_probability = 0.0
        delta, r = self.steps(), self.scales()
        self.log_delta = self.log_r = None
        self.delta.copy_(delta)
        self.r.copy_(r)

    def steps(self) -> Tensor:
        """(G,) current steps, differentiable in what is learned."""
        return self.delta if self.log_delta is None else self.delta * self.log_delta.exp()

    def scales(self) -> Tensor:
        """(C,) current r, its geometric mean unchanged by learning."""
        return self.r if self.log_r is None else self.r * (self.log_r - self.log_r.mean()).exp()

    def forward(self, x: Tensor) -> Tensor:
        """Shift and quantize (B, ...) values, each sample by its timestep group."""
        x = self.centred(x)
        if not self.enabled:
            return x
        current = self.groups.of_rows(x.shape[0])
        if x.shape[0] == 1 and self.groups.single is not None:
            current = current[:1]  # nothing tells samples apart
        x = for_all_samples(x, len(current))
        step = per_sample(self.steps(), current, x.ndim)
        if self.r.numel() > 1:
            step = step * along(self.scales(), x.ndim, self.channel_dim)
        zero = per_sample(self.zero_point, current, x.ndim)
        return self.dropped(x, fake_quantize(x, step, -zero, 2**self.bits - 1 - zero, narrow=True))

    def dropped(self, x: Tensor, quantized: Tensor) -> Tensor:
        """QDrop: a share of the elements as they were, while something is learned."""
        if self.drop_probability and torch.is_grad_enabled():  # units stay in evaluation mode throughout a fit
            return torch.where(torch.rand_like(x) < self.drop_probability, x, quantized)
        return quantized


ACTIVATION_QUANTIZERS: Registry[type[ActivationQuantizer]] = Registry("activation quantizer")
"""By the name that `quantization.activation.quantizer` takes."""
ACTIVATION_QUANTIZERS.register("uniform")(ActivationQuantizer)
