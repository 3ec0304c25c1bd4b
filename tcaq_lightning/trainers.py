"""Quiet Lightning trainers: one for each observation and each fit of a unit."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger

from tcaq_lightning.config import TrainerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.files import CheckedCheckpointIO


def quiet_lightning() -> None:
    """Keep the lines that Lightning writes for every Trainer off the console; one progress bar shows the run."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in (
        ".*does not have many workers.*",
        ".*in eval mode at the start of training.*",
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",
        ".*is a wrapped LightningModule.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*GPU available but not used.*",
    ):
        warnings.filterwarnings("ignore", pattern)


def choose_device(config: TrainerConfig) -> torch.device:
    """The device that Lightning would train on.

    Raises:
        UserError: the accelerator is unknown or not there.
    """
    try:
        trainer = make_trainer(config, [])
    except Exception as error:  # Lightning raises several kinds
        raise UserError(f"trainer.accelerator: {config.accelerator!r} cannot be used: {error}") from error
    device: torch.device = trainer.strategy.root_device
    return device


class UnitCheckpoint(pl.Callback):
    """Write the running fit's checkpoint every `every` optimisation steps."""

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Save after a step that completes a stretch, but not after the last one: the unit file follows at once."""
        if trainer.global_step % self.every == 0 and trainer.global_step < trainer.max_steps:
            trainer.save_checkpoint(self.path)


def make_trainer(
    config: TrainerConfig,
    callbacks: Sequence[pl.Callback],
    logger: Logger | None = None,
    max_steps: int = -1,
    log_every_n_steps: int = 20,
) -> pl.Trainer:
    """A fresh Trainer without bars, summaries or checkpoints of its own."""
    return pl.Trainer(
        accelerator=config.accelerator,
        devices=1,
        max_epochs=1,
        max_steps=max_steps,
        callbacks=list(callbacks),
        logger=logger if logger is not None else False,
        log_every_n_steps=log_every_n_steps,
        plugins=[CheckedCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        barebones=False,
        use_distributed_sampler=False,
        inference_mode=False,
    )
