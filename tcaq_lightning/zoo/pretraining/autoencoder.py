r"""Pretraining of the autoencoder whose latent space the shipped latent models share.

    python -m tcaq_lightning.zoo.pretraining.autoencoder --data /usr/share/datasets/fashion-mnist --output runs/vae \
        --steps 3000 [--batch_size 32] [--lr 1e-3] [--precision bf16-mixed] [--threads 1] [--seed 0]

`OUTPUT/model` is the `AutoencoderKL` with the averaged weights and the scaling factor of its latents,
`OUTPUT/last.ckpt` the state of the training. The same command resumes from it. At the end, the error and the FID of
the reconstructed test images are written as one line of JSON to standard output.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.features import (
    REFERENCE_FILE,
    SHIPPED,
    FeatureExtractor,
    extract_features,
    load_feature_extractor,
)
from tcaq_lightning.evaluation.metrics.fid import frechet_distance
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics
from tcaq_lightning.zoo.pretraining.batches import batch_indices, generator
from tcaq_lightning.zoo.pretraining.command import run
from tcaq_lightning.zoo.pretraining.idx import normalize, read_split
from tcaq_lightning.zoo.pretraining.training import Precision, Pretraining, Recipe, fit, replace_files

ARCHITECTURE: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "sample_size": 28,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
"""28 x 28 x 1 to 7 x 7 x 4: Stable Diffusion's autoencoder, narrower and with one downsampling less."""
_SCALING_IMAGES = 5000


@dataclass(frozen=True)
class AutoencoderRecipe(Recipe):
    """Recipe of an autoencoder's pretraining."""

    kl_weight: float = 0.01
    """Weight of the latents' divergence from a standard normal distribution, in nats a latent value."""
    perceptual_weight: float = 0.5
    """Weight of the distance of the feature maps."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("kl_weight", self.kl_weight >= 0, "at least 0")
        self.check("perceptual_weight", self.perceptual_weight >= 0, "at least 0")


def perceptual_distance(extractor: FeatureExtractor, a: Tensor, b: Tensor) -> Tensor:
    """Distance of two batches of images in the feature maps of a classifier.

    sum_l mean_hw || a_l / |a_l| - b_l / |b_l| ||^2   (Zhang et al. 2018, eq. 1, with equal weights for the channels)

    Args:
        extractor: its rectified feature maps are compared.
        a: (B, 1, H, W) in [-1, 1].
        b: the same.

    Returns:
        Scalar.
    """
    distance = a.new_zeros(())
    a, b = a.clamp(-1, 1), b.clamp(-1, 1)
    for layer in extractor.body:
        a, b = layer(a), layer(b)
        if isinstance(layer, nn.ReLU):
            distance = distance + (F.normalize(a, eps=1e-3) - F.normalize(b, eps=1e-3)).square().sum(dim=1).mean()
    return distance


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Divergence of N(mean, exp(log_variance)) from N(0, 1), averaged over all values, in nats.

    >>> kl_divergence(torch.ones(2, 3), torch.zeros(2, 3))
    tensor(0.5000)
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


class AutoencoderPretraining(Pretraining):
    """L1 and feature distance of the reconstruction, and a weak prior on the latents (Rombach et al. 2022, app. G).

    Args:
        network: `AutoencoderKL`.
        extractor: frozen, for the feature distance.
        images: uint8 (N, H, W), the training data.
        recipe: how to train.
    """

    recipe: AutoencoderRecipe

    def __init__(
        self, network: nn.Module, extractor: FeatureExtractor, images: Tensor, recipe: AutoencoderRecipe
    ) -> None:
        super().__init__(network, recipe)
        self.extractor = extractor
        self.images = images

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """The loss of one step; its data are drawn from (seed, global_step), so a resumed run sees the same."""
        recipe, step = self.recipe, self.global_step
        network: Any = self.network
        x = normalize(self.images[batch_indices(len(self.images), recipe.batch_size, step, recipe.seed)])
        x = x.to(self.device)
        posterior = network.encode(x).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator(recipe.seed, step, stream=1)).to(mean)
        reconstruction = network.decode(mean + (0.5 * log_variance).exp() * noise).sample.float()
        losses = {
            "l1": F.l1_loss(reconstruction, x),
            "perceptual": perceptual_distance(self.extractor, reconstruction, x),
            "kl": kl_divergence(mean, log_variance),
        }
        loss = losses["l1"] + recipe.perceptual_weight * losses["perceptual"] + recipe.kl_weight * losses["kl"]
        self.log_dict({"loss": loss, **losses}, on_step=True, on_epoch=False)
        return loss

    def export(self, directory: Path) -> None:
        """Write the averaged autoencoder with its scaling factor."""
        average: Any = self.average
        mean, deviation = encode(average, self.images[:_SCALING_IMAGES])
        average.register_to_config(scaling_factor=scaling_factor(mean, deviation))
        replace_files(average.save_pretrained, directory)


@torch.no_grad()
def encode(autoencoder: Any, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Posteriors of the latents of many images.

    Args:
        autoencoder: `AutoencoderKL`.
        images: uint8 (N, H, W).
        batch_size: images at a time.

    Returns:
        Mean and standard deviation, float32 (N, C, h, w) each, on the CPU.
    """
    posteriors = [
        autoencoder.encode(normalize(batch).to(autoencoder.device)).latent_dist
        for batch in torch.split(images, batch_size)
    ]
    return torch.cat([p.mean.cpu() for p in posteriors]), torch.cat([p.std.cpu() for p in posteriors])


def scaling_factor(mean: Tensor, deviation: Tensor) -> float:
    """What gives samples of the posteriors a standard deviation of 1 over all values (Rombach et al. 2022, app. G).

    >>> scaling_factor(torch.tensor([-3.0, 3.0]), torch.tensor([4.0, 4.0]))
    0.2
    """
    variance = mean.double().var(correction=0) + deviation.double().square().mean()
    return round(float(variance.rsqrt()), 4)


@torch.no_grad()
def reconstruct(autoencoder: Any, images: Tensor, batch_size: int = 500) -> Tensor:
    """Images, uint8 (N, H, W), decoded from the means of their latents, (N, 1, H, W) in [-1, 1].

    Args:
        autoencoder: in inference mode.
        images: (N, H, W) uint8.
        batch_size: images per pass.
    """
    mean, _ = encode(autoencoder, images, batch_size)
    decoded = [autoencoder.decode(z.to(autoencoder.device)).sample.cpu() for z in torch.split(mean, batch_size)]
    return torch.cat(decoded).clamp(-1, 1)


def score(autoencoder: Any, images: Tensor, features: Path = SHIPPED) -> dict[str, float]:
    """Mean squared error, in the units of [-1, 1], and FID of reconstructed images.

    Args:
        autoencoder: `AutoencoderKL`.
        images: uint8 (N, H, W).
        features: directory of the feature extractor and its reference statistics.
    """
    reconstructed = reconstruct(autoencoder, images)
    extractor, reference = load_feature_extractor(features), ReferenceStatistics.load(features / REFERENCE_FILE)
    fid = frechet_distance(extract_features(extractor, reconstructed), reference)
    mse = F.mse_loss(reconstructed, normalize(images))
    return {"mse": round(float(mse), 5), "fid": round(fid.value, 3), "images": len(images)}


def new_autoencoder(seed: int) -> Any:
    """The shipped autoencoder's architecture with random weights."""
    autoencoder_class: Any = AutoencoderKL
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return autoencoder_class(**ARCHITECTURE)


def load_autoencoder(directory: Path) -> Any:
    """Read an autoencoder, frozen.

    Args:
        directory: holds its config.json and safetensors.

    Raises:
        UserError: there is none.
    """
    autoencoder_class: Any = AutoencoderKL
    try:
        autoencoder = autoencoder_class.from_pretrained(
            directory, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"expected an AutoencoderKL in {directory}, got none ({reason}); "
            "train one with python -m tcaq_lightning.zoo.pretraining.autoencoder"
        ) from None
    return autoencoder.eval().requires_grad_(False)


def main(
    data: Path,
    output: Path,
    steps: int,
    batch_size: int = 32,
    lr: float = 1e-3,
    warmup: int = 100,
    ema_decay: float = 0.999,
    seed: int = 0,
    kl_weight: float = 0.01,
    perceptual_weight: float = 0.5,
    precision: Precision = "32-true",
    threads: int | None = None,
    save_every: int = 500,
) -> None:
    """Pretrain the autoencoder of the shipped latent models.

    Args:
        data: directory of the IDX files, such as /usr/share/datasets/fashion-mnist.
        output: directory of the run; a run that is there is resumed.
        steps: optimizer steps in all.
        batch_size: images a step.
        lr: peak learning rate; a cosine takes it to 0.
        warmup: steps of linear warmup.
        ema_decay: largest decay of the moving average of the weights.
        seed: seeds the weights, the order of the images and the noise.
        kl_weight: weight of the latents' divergence from a standard normal distribution.
        perceptual_weight: weight of the distance of the feature maps.
        precision: bf16-mixed is faster on processors with bfloat16 arithmetic.
        threads: CPU threads; without it, PyTorch's own number.
        save_every: steps between two checkpoints and exports.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    recipe = AutoencoderRecipe(steps, batch_size, lr, warmup, ema_decay, seed, kl_weight, perceptual_weight)
    images, _ = read_split(data, "train")
    module = AutoencoderPretraining(new_autoencoder(seed), load_feature_extractor(), images, recipe)
    model = fit(module, output, save_every, precision, progress_bar=sys.stderr.isatty())
    test_images, _ = read_split(data, "test")
    sys.stdout.write(json.dumps(score(load_autoencoder(model), test_images)) + "\n")


if __name__ == "__main__":
    run(main)
