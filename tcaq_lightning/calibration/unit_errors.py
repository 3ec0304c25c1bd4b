"""How well a unit does on samples: by timestep group and output channel, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.losses import channel_errors
from tcaq_lightning.calibration.unit_data import UnitData
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.distributed.collectives import total


@torch.no_grad()
def squared_errors(
    unit: nn.Module,
    data: UnitData,
    samples: Tensor,
    timestep_groups: TimestepGroups,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """Squared error of the unit as it is now, over the samples of all ranks; its sum is the block error.

    Args:
        unit: quantized unit.
        data: its samples on this rank.
        samples: numbers of those to look at; there may be none here.
        timestep_groups: timestep groups of the denoiser.
        batch_size: samples per pass.
        device: where to compute.

    Returns:
        (G, C) by timestep group and output channel.
    """
    sums = torch.zeros(timestep_groups.num_groups, data.channels, dtype=torch.float64)
    for batch in data.batches(in_batches(samples, batch_size), device):
        output = data.run_batch(unit, timestep_groups, batch)
        squares, _ = channel_errors(output, batch.targets)
        sums.index_add_(0, batch.groups.cpu(), squares.double().cpu())
    return (total(sums) / total(torch.tensor(len(samples)))).float()


def weighted_sum(squares: Tensor, weights: Tensor | None) -> float:
    """The block error that squared errors (G, C) add up to with weights (G, C); None weighs all of them 1."""
    return float((squares if weights is None else squares * weights).sum())


def in_batches(samples: Tensor, size: int) -> Sequence[Tensor]:
    """The numbers of samples in batches; none of none."""
    return torch.split(samples, size) if len(samples) else ()


@torch.no_grad()
def mean_errors(
    unit: nn.Module,
    data: UnitData,
    samples: Tensor,
    timestep_groups: TimestepGroups,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """Mean of target - output over the samples of all ranks; 0 for timestep groups without samples.

    Args:
        unit: quantized unit.
        data: its samples on this rank.
        samples: numbers of those to look at; there may be none here.
        timestep_groups: timestep groups of the denoiser.
        batch_size: samples per pass.
        device: where to compute.

    Returns:
        (G, C) by timestep group and output channel.
    """
    sums = torch.zeros(timestep_groups.num_groups, data.channels, dtype=torch.float64)
    counts = torch.zeros(timestep_groups.num_groups, 1, dtype=torch.float64)
    for batch in data.batches(in_batches(samples, batch_size), device):
        _, errors = channel_errors(data.run_batch(unit, timestep_groups, batch), batch.targets)
        groups = batch.groups.cpu()
        sums.index_add_(0, groups, -errors.double().cpu())
        counts.index_add_(0, groups, torch.ones(len(groups), 1, dtype=torch.float64))
    return (total(sums) / total(counts).clamp(min=1)).float()
