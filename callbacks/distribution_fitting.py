"""Distributions of post-softmax values: streamed histograms, and DAQ's fits at the end of the pass."""

from __future__ import annotations

import pytorch_lightning as pl
from torch import Tensor, nn

from callbacks.hooks import QuantizerInputs
from tcaq_lightning.calibration.observation import UnitObservation
from tcaq_lightning.methods.daq import LogHistogram, decide_by_likelihood
from tcaq_lightning.quantizers import SoftmaxQuantizer


class DistributionFitting(QuantizerInputs):
    """Gather histograms during an observation pass and fit their tails (METHOD section 4)."""

    kind = SoftmaxQuantizer

    def receive(self, observation: UnitObservation, name: str, quantizer: nn.Module, x: Tensor) -> None:
        """Count the values of each timestep group."""
        histograms, context = observation.observed.histograms, observation.context
        if name not in histograms:
            histograms[name] = LogHistogram(context.num_groups, device=x.device)
        histograms[name].update(x, context.current)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the hooks, reduce the histograms over the ranks and fit every group's tail."""
        super().on_predict_end(trainer, pl_module)
        assert isinstance(pl_module, UnitObservation)
        for name, histogram in pl_module.observed.histograms.items():
            histogram.reduce()
            pl_module.observed.fits[name] = decide_by_likelihood(histogram)
