"""Observation of a unit: statistics of what reaches its quantizers while it runs in full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tcaq_lightning.calibration.initialize import Observations
from tcaq_lightning.calibration.unit_data import UnitData
from tcaq_lightning.methods.daq import LogHistogram, decide_by_likelihood
from tcaq_lightning.nn.parts import quantizers
from tcaq_lightning.nn.state import full_precision
from tcaq_lightning.quantizers import ActivationQuantizer, SoftmaxQuantizer
from tcaq_lightning.quantizers.observers import RangeStatistics
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups


@contextmanager
def observing(unit: nn.Module, timestep_groups: TimestepGroups) -> Iterator[Observations]:
    """Run a unit in full precision within; gives what reaches its quantizers, complete at the end.

    Ranges are taken of every activation (docs/method.md, "TCR"), histograms and the fits of their tails of every
    softmax (docs/method.md, "DAQ"), by timestep group and over all ranks.

    Args:
        unit: quantized unit.
        timestep_groups: timestep groups of the denoiser, which know the samples of the batch that runs.
    """
    found = Observations()
    handles = [
        q.register_forward_pre_hook(_hook(found, name, q, timestep_groups)) for name, q in quantizers(unit).items()
    ]
    try:
        with full_precision(unit):
            yield found
    finally:
        for handle in handles:
            handle.remove()
    for ranges in found.ranges.values():
        ranges.reduce()
    for name, histogram in found.histograms.items():
        histogram.reduce()
        found.fits[name] = decide_by_likelihood(histogram)


def _hook(
    found: Observations, name: str, quantizer: ActivationQuantizer | SoftmaxQuantizer, timestep_groups: TimestepGroups
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def receive(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        (x, *_) = args  # (B, ...)
        if quantizer.place == "probabilities":
            if name not in found.histograms:
                found.histograms[name] = LogHistogram(timestep_groups.num_groups, device=x.device)
            found.histograms[name].update(x, timestep_groups.current)
        else:
            if name not in found.ranges:
                found.ranges[name] = RangeStatistics(timestep_groups.num_groups, x.shape[quantizer.channel_dim])
            found.ranges[name].update(x, timestep_groups.current, quantizer.channel_dim)

    return receive


class UnitObservation(pl.LightningModule):
    """Run a unit on its quantized-stream inputs, batch by batch.

    Args:
        unit: quantized unit.
        data: its calibration samples.
        samples: which of them to observe.
        timestep_groups: timestep groups of the denoiser.
        batch_size: samples per pass.
    """

    def __init__(
        self, unit: nn.Module, data: UnitData, samples: Tensor, timestep_groups: TimestepGroups, batch_size: int
    ) -> None:
        super().__init__()
        self.unit = unit
        self.data = data
        self.batches = torch.split(samples, batch_size)
        self.timestep_groups = timestep_groups

    def predict_dataloader(self) -> DataLoader[int]:
        """Bare batch numbers."""
        return DataLoader(range(len(self.batches)), batch_size=None)  # type: ignore[arg-type]

    def predict_step(self, batch: int, *_: Any) -> int:
        """Run one batch; returns its size."""
        self.data.run(self.unit, self.timestep_groups, self.batches[batch], self.device)
        return len(self.batches[batch])
