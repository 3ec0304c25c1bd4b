"""Observers: ranges of activations and histograms of attention probabilities, by timestep group, batch by batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.distributed.collectives import largest, smallest, total

# Values binned at once: on a CPU the temporaries stay in cache (several times faster), elsewhere they bound the memory.
_CPU_CHUNK, _DEVICE_CHUNK = 1 << 17, 1 << 24


class RangeStatistics:
    """Smallest and largest value of each channel in each timestep group.

    Attributes:
        low: (G, C) smallest values; +inf where nothing was seen.
        high: (G, C) largest values; -inf where nothing was seen.

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
        """Take in a batch.

        Args:
            x: (B, ...) or (k B, ...), k rows in sequence for each sample.
            groups: (B,) timestep groups.
            channel_dim: axis of the channels.
        """
        if not x.numel():  # as of an expert that nothing was sent to
            return
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


class LogHistogram:
    """Streaming histogram of values in [0, 1] on a logarithmic axis, one row per timestep group.

    Rows are integers and add up exactly, so pieces of a stream, workers and ranks can be combined in any order.

    Args:
        num_groups: number of timestep groups G.
        low: left end of the first logarithmic bin; smaller values and zeros share one underflow bin.
        bins_per_decade: resolution, at most 200.
        device: where `counts` lives; values may come from any device.

    Attributes:
        counts: (G, 1 + bins) int64; column 0 is the underflow bin [0, low), the last bin includes 1.
        edges: (2 + bins,) float64 on the CPU: 0, low, ..., 1.

    >>> histogram = LogHistogram(num_groups=2, low=0.01, bins_per_decade=1)
    >>> histogram.update(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 1]))
    >>> histogram.counts.tolist()
    [[0, 0, 2], [1, 0, 1]]
    """

    def __init__(
        self,
        num_groups: int,
        low: float = 1e-8,
        bins_per_decade: int = 40,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_groups < 1:
            raise UserError(f"num_groups must be at least 1, got {num_groups}")
        if not 1e-30 <= low <= 0.1:
            raise UserError(f"low must be in [1e-30, 0.1], got {low}; it is the smallest probability told apart from 0")
        if not 1 <= bins_per_decade <= 200:
            raise UserError(f"bins_per_decade must be in 1..200, got {bins_per_decade}")
        bins = max(1, round(-math.log10(low) * bins_per_decade))
        log_edges = torch.linspace(math.log(low), 0.0, bins + 1, dtype=torch.float64)
        self.edges = torch.cat([torch.zeros(1, dtype=torch.float64), log_edges.exp()])
        self.counts = torch.zeros(num_groups, bins + 1, dtype=torch.int64, device=device)
        # The upper 16 bits of a float32 in [0, 1] pick a cell less than 1 % wide, with at most one edge inside: the bin
        # is that of the cell's start, plus one from the edge on. Exact comparisons, ten times faster than a search.
        inner = self.edges[1:-1].float()
        cells = torch.arange(0x3F80 + 1, dtype=torch.int32) << 16
        self._cell_bin = torch.bucketize(cells.view(torch.float32), inner, right=True, out_int32=True)
        self._cell_edge = torch.cat([inner, torch.full((1,), math.inf)])[self._cell_bin.long()]

    def update(self, values: Tensor, groups: Tensor) -> None:
        """Count a batch.

        Args:
            values: (B, ...) probabilities; compared with the edges in float32.
            groups: (B,) int64 timestep group of each sample, in 0..G-1.

        Raises:
            UserError: a value is not finite or outside [0, 1], or a group is out of range.
        """
        num_groups, width = self.counts.shape
        if groups.ndim != 1 or values.ndim < 1 or groups.shape[0] != values.shape[0]:
            raise UserError(
                f"groups must hold one index per sample, shape ({values.shape[0] if values.ndim else 0},), "
                f"got {tuple(groups.shape)} for values of shape {tuple(values.shape)}"
            )
        if values.numel() == 0:
            return
        values = values.detach()
        lowest, highest = (float(bound) for bound in torch.aminmax(values))
        if not (lowest >= 0 and highest <= 1.001):  # written so that NaN fails
            raise UserError(f"attention probabilities must be finite and in [0, 1], got {lowest} to {highest}")
        if not (int(groups.min()) >= 0 and int(groups.max()) < num_groups):
            raise UserError(f"groups must be in 0..{num_groups - 1}, got {int(groups.min())} to {int(groups.max())}")
        self._cell_bin = self._cell_bin.to(values.device)
        self._cell_edge = self._cell_edge.to(values.device)
        offsets = groups.to(values.device, torch.int32)[:, None] * width  # (B, 1)
        flat = values.reshape(values.shape[0], -1)  # (B, N)
        chunk = _CPU_CHUNK if values.device.type == "cpu" else _DEVICE_CHUNK
        for part in torch.split(flat, max(1, chunk // flat.shape[0]), dim=1):
            part = part.float().contiguous()
            cell = (part.view(torch.int32) >> 16).bitwise_and_(0x7FFF).flatten()  # without the sign bit of -0.0
            index = self._cell_bin.index_select(0, cell).view_as(part)
            index += part >= self._cell_edge.index_select(0, cell).view_as(part)
            counted = torch.bincount(index.add_(offsets).flatten(), minlength=num_groups * width)
            self.counts += counted.view(num_groups, width).to(self.counts.device)

    def merge(self, other: LogHistogram) -> None:
        """Add the counts of another histogram with the same groups and edges.

        Raises:
            UserError: the two differ in groups or edges.
        """
        if self.counts.shape != other.counts.shape or not torch.equal(self.edges, other.edges):
            raise UserError(
                f"histograms must have the same groups and edges to be merged, got {tuple(self.counts.shape)} from "
                f"{self.edges[1]:g} and {tuple(other.counts.shape)} from {other.edges[1]:g}"
            )
        self.counts += other.counts.to(self.counts.device)

    def reduce(self) -> None:
        """Add the counts of all ranks; exact."""
        self.counts = total(self.counts.cpu()).to(self.counts.device)
