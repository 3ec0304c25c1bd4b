"""How well a unit does on samples: by timestep group and output channel, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.losses import channel_errors
from tcaq_lightning.calibration.unit_data import UnitData
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.distributed.collectives import total


@dataclass(frozen=True)
class UnitErrors:
    """Errors of a unit's output.

    Attributes:
        squares: (G, C) share of each timestep group and output channel in the block error; they add up to it.
        means: (G, C) mean of target - output; 0 for timestep groups without samples.
    """

    squares: Tensor
    means: Tensor


@torch.no_grad()
def unit_errors(
    unit: nn.Module,
    data: UnitData,
    samples: Tensor,
    timestep_groups: TimestepGroups,
    batch_size: int,
    device: torch.device,
) -> UnitErrors:
    """Errors of the unit as it is now, over the samples of all ranks.

    Args:
        unit: quantized unit.
        data: its samples on this rank.
        samples: (N,) indices of the samples to look at; N may be 0 on some ranks.
        timestep_groups: those of the denoiser.
        batch_size: samples per pass.
        device: where to compute.
    """
    squares = torch.zeros(timestep_groups.num_groups, data.channels, dtype=torch.float64)
    sums, counts = torch.zeros_like(squares), torch.zeros(timestep_groups.num_groups, 1, dtype=torch.float64)
    for batch in data.batches(in_batches(samples, batch_size), device):
        squared, errors = channel_errors(data.run_batch(unit, timestep_groups, batch), batch.targets)
        groups = batch.groups.cpu()
        squares.index_add_(0, groups, squared.double().cpu())
        sums.index_add_(0, groups, -errors.double().cpu())
        counts.index_add_(0, groups, torch.ones(len(groups), 1, dtype=torch.float64))
    counts = total(counts)
    return UnitErrors((total(squares) / counts.sum()).float(), (total(sums) / counts.clamp(min=1)).float())


def weighted_sum(squares: Tensor, weights: Tensor | None) -> float:
    """The block error that squared errors (G, C) add up to with weights (G, C); None weighs all of them 1.

    Args:
        squares: (G, C) squared errors, as in `UnitErrors`.
        weights: (G, C); None: all are 1.
    """
    return float((squares if weights is None else squares * weights).sum())


def in_batches(samples: Tensor, size: int) -> Sequence[Tensor]:
    """The indices of samples in batches; no batch if there are none."""
    return torch.split(samples, size) if len(samples) else ()
