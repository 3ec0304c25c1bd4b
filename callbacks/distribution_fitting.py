"""Distributions of post-softmax values: streamed histograms, and DAQ's fits at the end of the pass."""

from __future__ import annotations

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from callbacks.hooks import hook_inputs
from tcaq_lightning.daq import LogHistogram, decide_by_likelihood
from tcaq_lightning.observation import UnitObservation
from tcaq_lightning.quantize import quantizers
from tcaq_lightning.quantizers import SoftmaxQuantizer


class DistributionFitting(pl.Callback):
    """Gather histograms during an observation pass and fit their tails (METHOD section 4)."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook the softmax quantizers."""
        assert isinstance(pl_module, UnitObservation)
        histograms, context = pl_module.observed.histograms, pl_module.context

        def receive(name: str, _module: nn.Module, x: Tensor) -> None:
            if name not in histograms:
                histograms[name] = LogHistogram(context.num_groups, device=x.device)
            histograms[name].update(x, context.current)

        chosen = {n: m for n, m in quantizers(pl_module.unit).items() if isinstance(m, SoftmaxQuantizer)}
        self._handles = hook_inputs(dict(chosen), receive)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the hooks and fit every group's tail."""
        assert isinstance(pl_module, UnitObservation)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name, histogram in pl_module.observed.histograms.items():
            pl_module.observed.fits[name] = decide_by_likelihood(histogram)
