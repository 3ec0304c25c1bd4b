r"""Pretraining of a small denoising diffusion model on an MNIST-like data set.

From scratch, or from a diffusers directory:

    python -m tcaq_lightning.pretraining.denoiser --data /usr/share/datasets/fashion-mnist --output runs/ddpm \
        --steps 20000 --batch_size 64 --lr 1e-3 [--init DIRECTORY] [--threads 2] [--seed 0]

`OUTPUT/model` is a diffusers directory (`DDIMPipeline`) with the averaged weights, brought up to date every
`save_every` steps; `OUTPUT/last.ckpt` is the state of the training. The same command resumes from it.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tcaq_lightning.errors import UserError
from tcaq_lightning.pretraining.batches import batch_indices, generator, stratified_timesteps
from tcaq_lightning.pretraining.command import run
from tcaq_lightning.pretraining.idx import normalize, read_split

ARCHITECTURE: dict[str, Any] = {
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_num_groups": 8,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
"""The family of DDIM's CIFAR-10 network (`google/ddpm-cifar10-32`), narrower, for 28 x 28 x 1."""

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
        for name, ok, expected in (
            ("steps", self.steps >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", self.lr > 0, "positive"),
            ("warmup", self.warmup >= 0, "at least 0"),
            ("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not ok:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)}; change --{name}")


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warmup, then a cosine to 0.

    >>> [round(learning_rate_factor(step, steps=12, warmup=4), 2) for step in (0, 3, 4, 8, 12)]
    [0.25, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class DenoiserPretraining(pl.LightningModule):
    """Noise prediction (Ho et al. 2020, eq. 14) with an exponential moving average of the weights.

    Args:
        denoiser: the network to train.
        scheduler: gives the noise schedule.
        images: uint8 (N, H, W), the training data.
        recipe: how to train.
    """

    def __init__(self, denoiser: nn.Module, scheduler: Any, images: Tensor, recipe: Recipe) -> None:
        super().__init__()
        self.denoiser = denoiser.train().requires_grad_(True)
        self.average = copy.deepcopy(denoiser).requires_grad_(False)
        self.scheduler = scheduler
        self.images = images
        self.recipe = recipe

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """The loss of one step; its data are drawn from (seed, global_step), so a resumed run sees the same."""
        recipe, step = self.recipe, self.global_step
        rng = generator(recipe.seed, step, stream=1)
        x0 = normalize(self.images[batch_indices(len(self.images), recipe.batch_size, step, recipe.seed)])
        noise = torch.randn(x0.shape, generator=rng)  # (B, 1, H, W)
        t = stratified_timesteps(recipe.batch_size, self.scheduler.config.num_train_timesteps, rng)
        x_t = self.scheduler.add_noise(x0, noise, t)
        loss = F.mse_loss(self.denoiser(x_t.to(self.device), t.to(self.device)).sample, noise.to(self.device))
        self.log("loss", loss, on_step=True, on_epoch=False)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the weights, then move the average towards them.

        Here and not in `on_train_batch_end`, which runs after the callbacks have written the checkpoint.
        """
        super().optimizer_step(*args, **kwargs)
        step = self.global_step + 1
        decay = min(self.recipe.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.denoiser.parameters()), 1 - decay)

    def configure_optimizers(self) -> Any:
        """AdamW without weight decay, linear warmup and cosine decay."""
        optimizer = torch.optim.AdamW(
            self.denoiser.parameters(), lr=self.recipe.lr, betas=(0.9, 0.99), weight_decay=0.0
        )
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
            if checkpoint["recipe"][name] != value:
                raise UserError(
                    f"--{name} {value} was given, but the run in --output has {checkpoint['recipe'][name]}; "
                    "give the same value to resume it, or another --output"
                )


class ModelExport(pl.Callback):
    """Writes the averaged weights as a diffusers directory every few steps and at the end.

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
        assert isinstance(pl_module, DenoiserPretraining)
        if trainer.is_global_zero and trainer.global_step % self.every == 0:
            export(pl_module.average, pl_module.scheduler, self.directory)
            _log.info("step %d: loss %.4f", trainer.global_step, float(outputs["loss"]))


def export(denoiser: nn.Module, scheduler: Any, directory: Path) -> None:
    """Write a `DDIMPipeline` directory; a reader sees either the old or the new weights, never half of them.

    Args:
        denoiser: its weights are written in float32.
        scheduler: written beside it.
        directory: made if it is not there.
    """
    scratch = directory.with_name(directory.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    model = copy.deepcopy(denoiser).float()
    pipeline: Any = DDIMPipeline(unet=model, scheduler=scheduler)  # type: ignore[no-untyped-call]
    pipeline.save_pretrained(scratch)
    config = scratch / "unet" / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)  # where the initial weights were on this machine
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for source in sorted(path for path in scratch.rglob("*") if path.is_file()):
        target = directory / source.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    shutil.rmtree(scratch)


def initial_model(init: Path | None, seed: int) -> tuple[nn.Module, Any]:
    """The network and noise schedule to start from.

    Args:
        init: diffusers directory, or None for random weights in the architecture of the shipped model.
        seed: seeds the random weights.

    Raises:
        UserError: the directory is not that of an unconditional `UNet2DModel` pipeline.
    """
    network_class: Any = UNet2DModel
    scheduler_class: Any = DDIMScheduler
    if init is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return network_class(**ARCHITECTURE), scheduler_class(beta_schedule="linear", num_train_timesteps=1000)
    try:
        denoiser = network_class.from_pretrained(
            init, subfolder="unet", use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
        scheduler = scheduler_class.from_pretrained(init, subfolder="scheduler", local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--init must be a diffusers directory with a UNet2DModel in unet/, got {init} ({reason})"
        ) from None
    return denoiser, scheduler


def pretrain(
    data: Path,
    output: Path,
    recipe: Recipe,
    init: Path | None = None,
    threads: int | None = None,
    save_every: int = 100,
    progress_bar: bool = False,
) -> Path:
    """Train a denoiser, or go on where an earlier call with the same arguments stopped.

    Args:
        data: directory of the IDX files.
        output: directory of the run.
        recipe: what decides the result.
        init: diffusers directory to start from; None starts from random weights.
        threads: CPU threads; None leaves PyTorch's own number.
        save_every: steps between two checkpoints and exports.
        progress_bar: show Lightning's progress bar.

    Returns:
        The diffusers directory with the averaged weights.

    Raises:
        UserError: bad data, initial model or setting, or a run of another recipe in `output`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if save_every < 1:
        raise UserError(f"save_every must be at least 1, got {save_every}; change --save_every")
    images, _ = read_split(data, "train")
    denoiser, scheduler = initial_model(init, recipe.seed)
    module = DenoiserPretraining(denoiser, scheduler, images, recipe)
    model, last = output / "model", output / "last.ckpt"
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=recipe.steps,
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
    loader: DataLoader[int] = DataLoader(range(recipe.steps), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None, weights_only=True)
    trainer.save_checkpoint(last)
    export(module.average, scheduler, model)
    return model


def main(
    data: Path,
    output: Path,
    steps: int,
    init: Path | None = None,
    batch_size: int = 64,
    lr: float = 1e-3,
    warmup: int = 100,
    ema_decay: float = 0.9995,
    seed: int = 0,
    threads: int | None = None,
    save_every: int = 100,
) -> None:
    """Pretrain the denoiser of the shipped Fashion-MNIST model.

    Args:
        data: directory of the IDX files, such as /usr/share/datasets/fashion-mnist.
        output: directory of the run; a run that is there is resumed.
        steps: optimizer steps in all.
        init: diffusers directory to start from; without it, random weights.
        batch_size: images a step.
        lr: peak learning rate; a cosine takes it to 0.
        warmup: steps of linear warmup.
        ema_decay: largest decay of the moving average of the weights.
        seed: seeds the order of the images, the timesteps and the noise.
        threads: CPU threads; without it, PyTorch's own number.
        save_every: steps between two checkpoints and exports.
    """
    recipe = Recipe(steps, batch_size, lr, warmup, ema_decay, seed)
    pretrain(data, output, recipe, init, threads, save_every, progress_bar=sys.stderr.isatty())


if __name__ == "__main__":
    run(main)
