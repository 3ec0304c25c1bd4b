"""Timestep groups: which activation parameters belong to which timestep.

Groups are intervals of t itself, not of a step's number, so that any sampler with any number of steps finds its group
(docs/method.md, "Quantizers"). Layers below the top of a denoiser never see t: its forward turns the `timestep`
argument into group indices that all its quantizers read while it runs, in each thread those of its own call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


class Running(NamedTuple):
    """The groups of a batch that is passing through a denoiser.

    Attributes:
        current: (B,) long, the group of each sample.
        single: the group when all samples share one known without a device sync, else None.
    """

    current: Tensor
    single: int | None = None


class _ThreadState(threading.local):
    running: Running | None = None
    """A class attribute, so that a thread that is new has one too: compiled code then serves all threads."""


class TimestepGroups:
    """The group of every sample that is passing through a denoiser now, in each thread by itself.

    Args:
        boundaries: G - 1, ascending.
    """

    def __init__(self, boundaries: Sequence[float]) -> None:
        self.boundaries = [float(b) for b in boundaries]
        self._everybody = Running(torch.zeros(1, dtype=torch.long), 0)  # where there is one group
        self._thread = _ThreadState()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies pass nothing through yet."""
        return type(self), (self.boundaries,)

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.boundaries) + 1

    @property
    def running(self) -> Running:
        """Groups of the batch that is passing in this thread.

        Raises:
            UserError: nothing said them, and there are several groups.
        """
        running = self._thread.running
        if running is not None:
            return running
        if self.boundaries:
            raise UserError(
                f"timestep: expected a call of the whole denoiser, which says the timestep, got one of a part of it "
                f"that has parameters for {self.num_groups} timestep groups; call the denoiser"
            )
        return self._everybody

    @property
    def current(self) -> Tensor:
        """(B,) long, the group of each sample of the running batch; raises as `running`."""
        return self.running.current

    @property
    def single(self) -> int | None:
        """The group of all samples of the running batch, where they share one; raises as `running`."""
        return self.running.single

    def of(self, timesteps: Tensor) -> Tensor:
        """Group of each timestep: the number of boundaries at or below it.

        >>> TimestepGroups([375.0]).of(torch.tensor([0, 374, 375, 999]))
        tensor([0, 0, 1, 1])
        """
        edges = torch.tensor(self.boundaries, dtype=torch.float32, device=timesteps.device)
        return torch.bucketize(timesteps.to(torch.float32).contiguous(), edges, right=True)

    def of_batch(self, timestep: Any, batch: int, device: torch.device) -> Running:
        """Groups of a batch, from what its denoiser is given.

        Args:
            timestep: a number, or a tensor of one or of B elements, or of several for each sample, as those of its
                frames or tokens: the noisiest counts, since what is given has timestep 0.
            batch: B.
            device: of the samples.
        """
        groups = self.of(_by_sample(torch.as_tensor(timestep, device=device), batch))
        if torch.compiler.is_compiling():  # values decide nothing there
            return Running(groups.expand(batch).contiguous() if groups.numel() == 1 else groups)
        # A batch of one timestep may hand it over for every sample; elsewhere a look at the values is a sync.
        if groups.numel() == 1 or (groups.device.type == "cpu" and bool((groups == groups[0]).all())):
            return Running(groups[:1].expand(batch).contiguous(), int(groups[0]))
        return Running(groups)

    def of_rows(self, rows: int) -> Tensor:
        """Groups of a tensor's rows, of which each sample of the running batch may have several in sequence.

        A single row is everybody's, and a single group everything's: these broadcast.

        >>> groups = TimestepGroups([500.0])
        >>> with groups.using(torch.tensor([0, 1])):
        ...     groups.of_rows(4)
        tensor([0, 0, 1, 1])

        Raises:
            UserError: as `running`.
            ValueError: a number of rows that is no multiple of B.
        """
        running = self._thread.running
        current = self.running.current if running is None else running.current
        batch = current.shape[0]
        if rows == batch or rows == 1 or batch == 1:
            return current
        if rows % batch:
            raise ValueError(f"expected a multiple of the {batch} samples that are passing, got {rows} rows")
        return current.repeat_interleave(rows // batch)

    def set(self, groups: Tensor, single: int | None = None) -> None:
        """Say which groups, (B,), the samples of this thread's batches are in from now on."""
        self._thread.running = Running(groups, single)

    @contextmanager
    def using(self, groups: Tensor, single: int | None = None) -> Iterator[None]:
        """Run a denoiser, or part of it, on samples of the given groups, (B,), in this thread."""
        before = self._thread.running
        self._thread.running = Running(groups, single)
        try:
            yield
        finally:
            self._thread.running = before


def _by_sample(timestep: Tensor, batch: int) -> Tensor:
    """(B,) or (1,) timesteps; of several that are no sample's, the largest."""
    flat = timestep.reshape(-1)
    if flat.numel() in (1, batch):
        return flat
    return flat.reshape(batch, -1).amax(1) if flat.numel() % batch == 0 else flat.amax(0, keepdim=True)


def some_positions(count: int, values: int) -> Tensor | slice:
    """At most `values` of `count` positions, drawn with replacement."""
    if count <= values:
        return slice(None)
    return torch.randint(count, (values,), generator=torch.Generator().manual_seed(count))


def values_by_group(x: Tensor, num_groups: int, values: int) -> Tensor:
    """(G, n) values of each group, at most `values`, from probes sorted by group with equal counts.

    Args:
        x: (B, ...) probes, sorted by group with equal counts.
        num_groups: G.
        values: largest number of values for a group.
    """
    rows = x.reshape(num_groups, -1)
    return rows[:, some_positions(rows.shape[1], values)]
