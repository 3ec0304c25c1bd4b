"""Observation of a unit: a Lightning predict pass over its stored inputs, for callbacks to take statistics from."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tcaq_lightning.calibration.initialize import Observations
from tcaq_lightning.calibration.streams import UnitData
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups


class UnitObservation(pl.LightningModule):
    """Run a unit in full precision on its quantized-stream inputs.

    Callbacks hook the unit's quantizers and gather into `observed`.

    Args:
        unit: quantized unit, switched to full precision.
        data: its calibration samples.
        samples: which of them to observe.
        context: timestep groups of the denoiser.
        batch_size: samples per pass.
    """

    def __init__(
        self, unit: nn.Module, data: UnitData, samples: Tensor, context: TimestepGroups, batch_size: int
    ) -> None:
        super().__init__()
        self.unit = unit
        self.data = data
        self.batches = torch.split(samples, batch_size)
        self.context = context
        self.observed = Observations()

    def predict_dataloader(self) -> DataLoader[int]:
        """Bare batch numbers."""
        return DataLoader(range(len(self.batches)), batch_size=None)  # type: ignore[arg-type]

    def predict_step(self, batch: int, *_: Any) -> int:
        """Run one batch for the callbacks, which see the quantizers' inputs; returns its size."""
        self.data.run(self.unit, self.context, self.batches[batch], self.device)
        return len(self.batches[batch])
