"""Timestep groups: which activation parameters belong to which timestep.

Groups are intervals of t itself, not of a step's number, so that any sampler with any number of steps finds its group
(docs/method.md, "Quantizers"). Layers below the top of a denoiser never see t: one pre-hook turns its `timestep`
argument into a group index that all quantizers of this denoiser share.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.errors import UserError


def group_boundaries(timesteps: Sequence[float], num_groups: int) -> list[float]:
    """Split a calibration grid in `num_groups` neighbourhoods of equal numbers of steps.

    Args:
        timesteps: timesteps that calibration visits, any order, repeats allowed.
        num_groups: G.

    Returns:
        G - 1 ascending boundaries, halfway between the neighbouring timesteps of two groups.

    Raises:
        UserError: more groups than distinct timesteps.

    >>> group_boundaries([0, 250, 500, 750], num_groups=2)
    [375.0]
    """
    grid = sorted({float(t) for t in timesteps})
    if num_groups > len(grid):
        raise UserError(
            f"quantization.activation.timestep_groups must be at most the number of distinct calibration timesteps "
            f"({len(grid)}), got {num_groups}; lower it or raise calibration.sampler.num_steps"
        )
    starts = [len(grid) * g // num_groups for g in range(1, num_groups)]
    return [(grid[i - 1] + grid[i]) / 2 for i in starts]


class TimestepGroups:
    """The group of every sample that is passing through a denoiser now.

    Attributes:
        current: (B,) long, the group of each sample of the running batch.
        single: the group when all samples share one known without a device sync, else None.
    """

    def __init__(self, boundaries: Sequence[float]) -> None:
        self.boundaries = [float(b) for b in boundaries]
        self.current = torch.zeros(1, dtype=torch.long)
        self.single: int | None = None

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.boundaries) + 1

    def of(self, timesteps: Tensor) -> Tensor:
        """Group of each timestep: the number of boundaries at or below it.

        >>> TimestepGroups([375.0]).of(torch.tensor([0, 374, 375, 999]))
        tensor([0, 0, 1, 1])
        """
        edges = torch.tensor(self.boundaries, dtype=torch.float32, device=timesteps.device)
        return torch.bucketize(timesteps.to(torch.float32).contiguous(), edges, right=True)

    def of_rows(self, rows: int) -> Tensor:
        """Groups of a tensor's rows, of which each sample of the running batch may have several in sequence.

        A single row is everybody's, and a single group everything's: these broadcast.

        >>> groups = TimestepGroups([500.0])
        >>> groups.set(torch.tensor([0, 1]))
        >>> groups.of_rows(4)
        tensor([0, 0, 1, 1])
        """
        batch = self.current.shape[0]
        if rows == batch or rows == 1 or batch == 1:
            return self.current
        if rows % batch:
            raise ValueError(f"expected a multiple of the {batch} samples that are passing, got {rows} rows")
        return self.current.repeat_interleave(rows // batch)

    def set(self, groups: Tensor, single: int | None = None) -> None:
        """Say which groups, (B,), the samples of the running batch are in."""
        self.current, self.single = groups, single

    @contextmanager
    def using(self, groups: Tensor) -> Iterator[None]:
        """Run part of a denoiser on samples of the given groups, (B,)."""
        before = self.current, self.single
        self.set(groups)
        try:
            yield
        finally:
            self.set(*before)


class TimestepHook:
    """Forward pre-hook of a denoiser: `timestep` argument -> shared group index."""

    def __init__(self, groups: TimestepGroups) -> None:
        self.groups = groups
        self._position: int | None = None

    def _position_in(self, module: nn.Module) -> int:
        """Where a denoiser takes its timestep, which is not always the second argument."""
        if self._position is None:
            names = list(inspect.signature(module.forward).parameters)
            self._position = names.index("timestep") if "timestep" in names else 1
        return self._position

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the groups of the batch that the denoiser is called on."""
        sample: Any = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[self._position_in(module)]
        batch = sample.shape[0]
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        groups = self.groups.of(t)
        # A batch of one timestep may hand it over for every sample; elsewhere a look at the values is a sync.
        if groups.numel() == 1 or (groups.device.type == "cpu" and bool((groups == groups[0]).all())):
            self.groups.set(groups[:1].expand(batch), int(groups[0]))
        else:
            self.groups.set(groups)


def some_positions(count: int, values: int) -> Tensor | slice:
    """At most `values` of `count` positions, drawn with replacement."""
    if count <= values:
        return slice(None)
    return torch.randint(count, (values,), generator=torch.Generator().manual_seed(count))


def values_by_group(x: Tensor, num_groups: int, values: int) -> Tensor:
    """(G, n) values of each group, at most `values`, from probes sorted by group with equal counts."""
    rows = x.reshape(num_groups, -1)
    return rows[:, some_positions(rows.shape[1], values)]
