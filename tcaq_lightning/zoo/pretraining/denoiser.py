r"""Pretraining of a small denoising diffusion model on an MNIST-like data set.

From scratch, or from a diffusers directory:

    python -m tcaq_lightning.zoo.pretraining.denoiser --data /usr/share/datasets/fashion-mnist --output runs/ddpm \
        --steps 20000 --batch_size 64 --lr 1e-3 [--init DIRECTORY] [--threads 2] [--seed 0]

`OUTPUT/model` is a diffusers directory (`DDIMPipeline`) with the averaged weights, brought up to date every
`save_every` steps; `OUTPUT/last.ckpt` is the state of the training. The same command resumes from it.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.zoo.pretraining.batches import batch_indices, generator, stratified_timesteps
from tcaq_lightning.zoo.pretraining.command import run
from tcaq_lightning.zoo.pretraining.idx import normalize, read_split
from tcaq_lightning.zoo.pretraining.training import Pretraining, Recipe, fit, replace_files

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
SCHEDULE: dict[str, Any] = {"beta_schedule": "linear", "num_train_timesteps": 1000, "clip_sample": False}
"""Noise schedule, and a sampler that does not clip, as it is calibrated and measured."""


class DenoiserPretraining(Pretraining):
    """Noise prediction (Ho et al. 2020, eq. 14).

    Args:
        network: the denoiser to train.
        scheduler: gives the noise schedule.
        images: uint8 (N, H, W), the training data.
        recipe: how to train.
    """

    def __init__(self, network: nn.Module, scheduler: Any, images: Tensor, recipe: Recipe) -> None:
        super().__init__(network, recipe)
        self.scheduler = scheduler
        self.images = images

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """The loss of one step; its data are drawn from (seed, global_step), so a resumed run sees the same."""
        recipe, step = self.recipe, self.global_step
        rng = generator(recipe.seed, step, stream=1)
        x0 = normalize(self.images[batch_indices(len(self.images), recipe.batch_size, step, recipe.seed)])
        noise = torch.randn(x0.shape, generator=rng)  # (B, 1, H, W)
        t = stratified_timesteps(recipe.batch_size, self.scheduler.config.num_train_timesteps, rng)
        x_t = self.scheduler.add_noise(x0, noise, t)
        loss = F.mse_loss(self.network(x_t.to(self.device), t.to(self.device)).sample, noise.to(self.device))
        self.log("loss", loss, on_step=True, on_epoch=False)
        return loss

    def export(self, directory: Path) -> None:
        """Write the averaged denoiser as a `DDIMPipeline`."""
        export(self.average, self.scheduler, directory)


def export(denoiser: nn.Module, scheduler: Any, directory: Path) -> None:
    """Write a `DDIMPipeline` directory; a reader sees either the old or the new weights, never half of them.

    Args:
        denoiser: its weights are written in float32.
        scheduler: written beside it.
        directory: made if it is not there.
    """
    model = copy.deepcopy(denoiser).float()
    pipeline: Any = DDIMPipeline(unet=model, scheduler=scheduler)  # type: ignore[no-untyped-call]
    replace_files(pipeline.save_pretrained, directory)


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
            return network_class(**ARCHITECTURE), scheduler_class(**SCHEDULE)
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
    images, _ = read_split(data, "train")
    denoiser, scheduler = initial_model(init, recipe.seed)
    module = DenoiserPretraining(denoiser, scheduler, images, recipe)
    return fit(module, output, save_every, progress_bar=progress_bar)


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
