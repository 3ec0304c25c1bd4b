"""Per-timestep, per-channel ranges of every activation that a unit quantizes."""

from __future__ import annotations

import pytorch_lightning as pl
from torch import Tensor, nn

from callbacks.hooks import QuantizerInputs
from tcaq_lightning.calibration.observation import UnitObservation
from tcaq_lightning.quantizers import ActivationQuantizer
from tcaq_lightning.quantizers.statistics import RangeStatistics


class ActivationStatistics(QuantizerInputs):
    """Gather ranges during an observation pass, into the observation's `observed.ranges` (METHOD section 3)."""

    kind = ActivationQuantizer

    def receive(self, observation: UnitObservation, name: str, quantizer: nn.Module, x: Tensor) -> None:
        """Widen the ranges of each channel in each timestep group."""
        assert isinstance(quantizer, ActivationQuantizer)
        ranges, context = observation.observed.ranges, observation.context
        if name not in ranges:
            ranges[name] = RangeStatistics(context.num_groups, x.shape[quantizer.channel_dim])
        ranges[name].update(x, context.current, quantizer.channel_dim)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the hooks and reduce the ranges over the ranks."""
        super().on_predict_end(trainer, pl_module)
        assert isinstance(pl_module, UnitObservation)
        for ranges in pl_module.observed.ranges.values():
            ranges.reduce()
