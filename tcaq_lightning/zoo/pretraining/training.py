"""What all pretrainings share: recipe, optimizer, averaged weights, exports, resuming."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.json_files import read_json

Precision = Literal["32-true", "bf16-mixed"]
"""Lightning's names of the precisions that these networks are trained in."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What decides the result of a pretraining, beside the data and the initial weights."""

    steps: int
    """Optimizer steps in all."""
    batch_size: int = 64
    """Images a step."""
    lr: float = 1e-3
    """Peak learning rate, reached after the warmup; a cosine takes it to 0."""
    warmup: int = 100
    """Steps of linear warmup."""
    ema_decay: float = 0.9995
    """Largest decay of the exponential moving average of the weights."""
    seed: int = 0
    """Seeds the order of the images, the timesteps and the noise."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("steps", self.steps >= 1, "at least 1")
        self.check("batch_size", self.batch_size >= 1, "at least 1")
        self.check("lr", self.lr > 0, "positive")
        self.check("warmup", self.warmup >= 0, "at least 0")
        self.check("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        self.check("seed", self.seed >= 0, "at least 0")

    def check(self, name: str, ok: bool, expected: str) -> None:
        """Refuse a setting out of its range.

        Args:
            name: of the setting.
            ok: whether it is in its range.
            expected: the range in words.

        Raises:
            UserError: `ok` is false.
        """
        if not ok:
            raise UserError(f"{name} must be {expected}, got {getattr(self, name)}; change --{name}")


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warmup, then a cosine to 0.

    Args:
        step: number of the step, from 0.
        steps: all steps.
        warmup: steps of linear warmup.

    >>> [round(learning_rate_factor(step, steps=12, warmup=4), 2) for step in (0, 3, 4, 8, 12)]
    [0.25, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Pretraining(pl.LightningModule):
    """Training of a network with an exponential moving average of its weights.

    Args:
        network: to train.
        recipe: how to train.
    """

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.network = network.train().requires_grad_(True)
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.recipe = recipe

    def export(self, directory: Path) -> None:
        """Write the averaged weights in diffusers layout, by `replace_files`."""
        raise NotImplementedError

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the weights, then move the average towards them.

        Here and not in `on_train_batch_end`, which runs after the callbacks have written the checkpoint.
        """
        super().optimizer_step(*args, **kwargs)
        step = self.global_step + 1
        decay = min(self.recipe.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)

    def configure_optimizers(self) -> Any:
        """AdamW without weight decay, linear warmup and cosine decay."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.recipe.steps, self.recipe.warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the recipe."""
        checkpoint["recipe"] = asdict(self.recipe)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another recipe.

        Raises:
            UserError: a setting differs.
        """
        for name, value in asdict(self.recipe).items():
            if checkpoint["recipe"].get(name) != value:
                raise UserError(
                    f"--{name} {value} was given, but the run in --output has {checkpoint['recipe'].get(name)}; "
                    "give the same value to resume it, or another --output"
                )


class ModelExport(pl.Callback):
    """Writes the averaged weights as a diffusers directory every few steps.

    Args:
        directory: where to.
        every: steps between two exports.
    """

    def __init__(self, directory: Path, every: int) -> None:
        self.directory = directory
        self.every = every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Export when it is time."""
        assert isinstance(pl_module, Pretraining)
        if trainer.is_global_zero and trainer.global_step % self.every == 0:
            pl_module.export(self.directory)
            _log.info("step %d: loss %.4f", trainer.global_step, float(outputs["loss"]))


def replace_files(save: Callable[[Path], None], directory: Path) -> None:
    """Write a directory of files; a reader of each sees either the old or the new one, never half of it.

    Args:
        save: writes the files, in diffusers layout, to the directory that it is given.
        directory: made if it is not there.
    """
    scratch = directory.with_name(directory.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    save(scratch)
    for config in scratch.rglob("config.json"):
        settings = read_json(config)
        settings.pop("_name_or_path", None)  # where the initial weights were on this machine
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for source in sorted(path for path in scratch.rglob("*") if path.is_file()):
        target = directory / source.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    shutil.rmtree(scratch)


def fit(
    module: Pretraining,
    output: Path,
    save_every: int = 100,
    precision: Precision = "32-true",
    progress_bar: bool = False,
) -> Path:
    """Train, or go on where an earlier call with the same arguments stopped.

    Args:
        module: what to train, and how.
        output: directory of the run: `model` holds the averaged weights, `last.ckpt` the state of the training.
        save_every: steps between two checkpoints and exports.
        precision: of the matrix multiplications and convolutions; the weights are float32 in either.
        progress_bar: show Lightning's progress bar.

    Returns:
        The directory with the averaged weights.

    Raises:
        UserError: a setting out of range, or a run of another recipe in `output`.
    """
    if save_every < 1:
        raise UserError(f"save_every must be at least 1, got {save_every}; change --save_every")
    steps, model, last = module.recipe.steps, output / "model", output / "last.ckpt"
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        precision=precision,
        max_steps=steps,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(output, name="tensorboard", version=""),
        callbacks=[
            ModelExport(model, save_every),
            ModelCheckpoint(
                output,
                filename="last",
                every_n_train_steps=save_every,
                save_top_k=1,
                enable_version_counter=False,
                save_on_train_epoch_end=False,
            ),
        ],
        enable_progress_bar=progress_bar,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    # One index a step in one long epoch: Lightning then has nothing to replay or to skip when it resumes.
    loader: DataLoader[int] = DataLoader(range(steps), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None, weights_only=True)
    trainer.save_checkpoint(last)
    module.export(model)
    return model
