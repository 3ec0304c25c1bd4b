"""Per-timestep, per-channel ranges of every activation that a unit quantizes."""

from __future__ import annotations

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from callbacks.hooks import hook_inputs
from tcaq_lightning.observation import UnitObservation
from tcaq_lightning.quantize import quantizers
from tcaq_lightning.quantizers import ActivationQuantizer
from tcaq_lightning.statistics import RangeStatistics


class ActivationStatistics(pl.Callback):
    """Gather ranges during an observation pass, into the observation's `observed.ranges` (METHOD section 3)."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook the quantizers of uniform kind."""
        assert isinstance(pl_module, UnitObservation)
        ranges, context = pl_module.observed.ranges, pl_module.context

        def receive(name: str, module: nn.Module, x: Tensor) -> None:
            assert isinstance(module, ActivationQuantizer)
            if name not in ranges:
                ranges[name] = RangeStatistics(context.num_groups, x.shape[module.channel_dim])
            ranges[name].update(x, context.current, module.channel_dim)

        chosen = {n: m for n, m in quantizers(pl_module.unit).items() if isinstance(m, ActivationQuantizer)}
        self._handles = hook_inputs(dict(chosen), receive)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
