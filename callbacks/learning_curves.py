"""Losses, undecided shares and learned parameters of every unit, for TensorBoard."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.tensorboard import SummaryWriter

from tcaq_lightning.calibration.reconstruction import BlockReconstruction


class LearningCurves(pl.Callback):
    """Log a fit's losses as it runs, and its r and steps when it ends, tagged by round and unit.

    Args:
        writer: the run's event writer.
        names: unit names in execution order.
        every: steps between two points; reading a loss waits for the device, so not every step is logged.
    """

    def __init__(self, writer: SummaryWriter, names: list[str], every: int) -> None:
        self.writer = writer
        self.names = names
        self.every = every

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log the losses and the share of undecided weights."""
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        assert isinstance(pl_module, BlockReconstruction)
        tag = self._tag(pl_module)
        for name, value in pl_module.losses.items():
            self.writer.add_scalar(f"{name}/{tag}", float(value), step)
        if pl_module.phase == "v":
            self.writer.add_scalar(f"undecided/{tag}", pl_module.undecided(), step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log histograms of what was learned, relative to where it began."""
        assert isinstance(pl_module, BlockReconstruction)
        for kind in ("r", "steps", "weight_scales"):
            values = [p.detach().flatten() for p in pl_module.learned[kind]]
            if values:
                self.writer.add_histogram(f"log_{kind}/{self._tag(pl_module)}", torch.cat(values), trainer.global_step)
        self.writer.flush()

    def on_save_checkpoint(self, *_: Any) -> None:
        """Bring the curves to disk with the checkpoint that goes on after them."""
        self.writer.flush()

    def _tag(self, module: BlockReconstruction) -> str:
        _, round_index, position = module.seeds
        return f"round{round_index}/{position:02d}-{self.names[position]}/{module.phase}"
