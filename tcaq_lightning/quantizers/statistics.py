"""Ranges of activations by timestep group and channel, accumulated batch by batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tcaq_lightning.runtime.distributed.collectives import largest, smallest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RangeStatistics:
    """Smallest and largest value of each channel in each timestep group.

    Attributes:
        low, high: (G, C); +inf and -inf where nothing was seen.

    >>> ranges = RangeStatistics(num_groups=2, channels=1)
    >>> ranges.update(torch.tensor([[-1.0], [3.0], [2.0]]), torch.tensor([0, 1, 1]), channel_dim=1)
    >>> ranges.low.flatten(), ranges.high.flatten()
    (tensor([-1.,  2.]), tensor([-1.,  3.]))
    """

    def __init__(self, num_groups: int, channels: int) -> None:
        self.low = torch.full((num_groups, channels), torch.inf)
        self.high = torch.full((num_groups, channels), -torch.inf)

    @torch.no_grad()
    def update(self, x: Tensor, groups: Tensor, channel_dim: int) -> None:
        """Take in a batch: `x` (B, ...) with its channels on `channel_dim`, `groups` (B,).

        Of k B rows, each k in sequence are one sample's.
        """
        channel_dim %= x.ndim
        if 1 < len(groups) < x.shape[0]:
            groups = groups.repeat_interleave(x.shape[0] // len(groups))
        others = [d for d in range(1, x.ndim) if d != channel_dim]
        low, high = (x.amin(others), x.amax(others)) if others else (x, x)  # (B, C)
        index = groups.unsqueeze(1).expand_as(low).cpu()
        self.low.scatter_reduce_(0, index, low.float().cpu(), "amin")
        self.high.scatter_reduce_(0, index, high.float().cpu(), "amax")

    def merge(self, other: RangeStatistics) -> None:
        """Take in what another one has seen; exact."""
        torch.minimum(self.low, other.low, out=self.low)
        torch.maximum(self.high, other.high, out=self.high)

    def reduce(self) -> None:
        """Take in what all ranks have seen; exact."""
        self.low, self.high = smallest(self.low), largest(self.high)

    def centre(self) -> Tensor:
        """(C,) mean over the groups of the middle of each channel's range; 0 where nothing was seen or it is huge."""
        seen = self.high >= self.low  # (G, C)
        middles = torch.where(seen, (self.low + self.high) / 2, torch.zeros_like(self.low))
        centre = middles.sum(0) / seen.sum(0).clamp(min=1)
        return torch.where(centre.abs() < torch.finfo(torch.float16).max, centre, torch.zeros_like(centre))

    def shifted(self, shift: Tensor) -> RangeStatistics:
        """The statistics of x - shift, for `shift` (C,)."""
        moved = RangeStatistics(*self.low.shape)
        moved.low, moved.high = self.low - shift, self.high - shift
        return moved

    def to(self, device: torch.device) -> RangeStatistics:
        """The statistics on another device."""
        moved = RangeStatistics(*self.low.shape)
        moved.low, moved.high = self.low.to(device), self.high.to(device)
        return moved

    def magnitude(self) -> Tensor:
        """(G, C) largest magnitude; 0 where nothing was seen."""
        return torch.maximum(self.high, -self.low).clamp(min=0)

    def limits(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """(G,) smallest and largest value over the channels of x / r, for `r` (C,) or (1,)."""
        return (self.low / r).amin(1), (self.high / r).amax(1)


def range_heat_maps(before: Tensor, after: Tensor, title: str, size: tuple[float, float] = (7, 4)) -> Figure:
    """Largest magnitude of each channel in each timestep group, before and after shift and division by r.

    Args:
        before, after: (G, C).
        title: heading.
        size: width and height in inches.
    """
    from matplotlib.figure import Figure

    before, after = before.clamp(min=1e-6).log10(), after.clamp(min=1e-6).log10()
    low, high = torch.quantile(torch.stack([before, after]), torch.tensor([0.01, 1.0])).tolist()
    figure = Figure(figsize=size)
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.13, top=0.85, hspace=0.9)  # a layout engine is far slower
    for axes, values, label in zip(
        figure.subplots(2, 1), (before, after), ("max |X|", "max |(X - shift) / r|"), strict=True
    ):
        image = axes.imshow(values.numpy(), aspect="auto", vmin=low, vmax=high, interpolation="nearest")
        axes.set(xlabel="channel", ylabel="timestep group", title=f"log10 {label}")
        figure.colorbar(image, ax=axes)
    figure.suptitle(title, fontsize=8)
    return figure
