"""Losses, undecided shares and learned parameters of every unit."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.tensorboard import SummaryWriter

from tcaq_lightning.calibration.callback import CalibrationCallback
from tcaq_lightning.calibration.reconstruction import BlockReconstruction
from tcaq_lightning.calibration.visit import Visit


class LearningCurves(CalibrationCallback):
    """Log a fit's losses as it runs, and its r and steps when it ends, tagged by round and unit.

    Args:
        writer: the run's event writer.
        every: steps between two points; reading a loss waits for the device, so not every step is logged.
    """

    def __init__(self, writer: SummaryWriter, every: int) -> None:
        self.writer = writer
        self.every = every
        self._tag = ""

    def on_unit_start(self, visit: Visit) -> None:
        """Tag what follows."""
        self._tag = visit.tag

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log the losses and the share of undecided weights."""
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        assert isinstance(pl_module, BlockReconstruction)
        for name, value in pl_module.losses.items():
            self.writer.add_scalar(f"{name}/{self._tag}/{pl_module.phase}", float(value), step)
        if pl_module.phase == "v":
            self.writer.add_scalar(f"undecided/{self._tag}/v", pl_module.undecided(), step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log histograms of what was learned, relative to where it began."""
        assert isinstance(pl_module, BlockReconstruction)
        for kind in ("r", "steps", "weight_scales"):
            values = [p.detach().flatten() for p in pl_module.learned[kind]]
            if values:
                tag = f"log_{kind}/{self._tag}/{pl_module.phase}"
                self.writer.add_histogram(tag, torch.cat(values), trainer.global_step)
        self.writer.flush()

    def on_save_checkpoint(self, *_: Any) -> None:
        """Bring the curves to disk with the checkpoint that a resumed fit starts from."""
        self.writer.flush()
