"""Quiet Lightning trainers: one for each observation and each fit of a unit."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import SingleDeviceStrategy

from tcaq_lightning.config import TrainerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.distributed import collectives
from tcaq_lightning.runtime.files import CheckedCheckpointIO


def quiet_lightning() -> None:
    """Suppress the lines that Lightning prints for every Trainer; one progress bar shows the run."""
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
        ".*Mismatch dtype between input and weight.*",  # a norm in float32 of what autocast has computed
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
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


class RankStrategy(SingleDeviceStrategy):
    """One rank of a data-parallel run on one device, which does its own communication (see `distributed`).

    Lightning's DDP strategy has no place in a loop that is to cost one all-reduce a step and to end cleanly: it
    broadcasts before each step whether rank 0 has got SIGTERM, waits for the device to read it, and calls a collective
    from within the signal handler; and torch's DistributedDataParallel, which it wraps modules in, arranges its buckets
    anew after a fit's first step, so that a resumed fit would round differently.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.global_rank = collectives.rank()

    def teardown(self) -> None:
        """Leave the module on its device: it is still used, and shares the denoiser's weights."""
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    @property
    def is_global_zero(self) -> bool:
        """Whether this rank writes checkpoints."""
        return self.global_rank == 0


class UnitCheckpoint(pl.Callback):
    """Write the running fit's checkpoint every `every` optimisation steps.

    Args:
        path: of the file.
        every: optimisation steps.
        place: JSON-ready, what the checkpoint is of; it is kept in it.
        spent: gives what was spent so far, JSON-ready; it is kept too.
    """

    def __init__(
        self, path: Path, every: int, place: Mapping[str, Any], spent: Callable[[], dict[str, Any]] = dict
    ) -> None:
        self.path = path
        self.every = every
        self.place = place
        self.spent = spent

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note what the checkpoint is of, and what it took."""
        checkpoint["place"] = dict(self.place)
        checkpoint["spent"] = self.spent()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Save after a step that completes a stretch, but not after the last one: the unit file follows at once."""
        last = trainer.should_stop or trainer.global_step == trainer.max_steps
        if trainer.global_step % self.every == 0 and not last:
            trainer.save_checkpoint(self.path)


def make_trainer(
    config: TrainerConfig,
    callbacks: Sequence[pl.Callback],
    logger: Logger | None = None,
    max_steps: int = -1,
    log_every_n_steps: int = 20,
    device: torch.device | None = None,
) -> pl.Trainer:
    """A fresh Trainer without bars, summaries or checkpoints of its own, for this rank.

    Args:
        config: accelerator.
        callbacks: Lightning's, in the order in which they are called.
        logger: Lightning's; None for none.
        max_steps: optimisation steps; -1 for no limit.
        log_every_n_steps: steps between two logged values.
        device: where this rank computes; None leaves it to the accelerator.
    """
    return pl.Trainer(
        accelerator=config.accelerator,
        devices=1,
        strategy="auto" if device is None else RankStrategy(device),
        max_epochs=1,
        max_steps=max_steps,
        callbacks=list(callbacks),
        logger=logger if logger is not None else False,
        log_every_n_steps=log_every_n_steps,
        plugins=[CheckedCheckpointIO(), LightningEnvironment()],  # under SLURM too: `launch` has placed this rank
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        barebones=False,
        use_distributed_sampler=False,
        inference_mode=False,
    )
