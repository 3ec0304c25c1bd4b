"""Errors of a quantized denoiser: of its predictions, and of the images sampled with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tcaq_lightning.models.pipelines import to_images
from tcaq_lightning.models.trajectories import Trajectories
from tcaq_lightning.runtime.distributed.collectives import total

PEAK = 2.0
"""Between the darkest and the brightest pixel of clipped samples."""


@dataclass(frozen=True)
class NoiseError:
    """Error of a quantized denoiser on full-precision trajectories, by sampler step.

    Attributes:
        timesteps: (S,) float64.
        relative: (S,) ||q - f||^2 / ||f||^2 over all trajectories, float64.
        bias: (S,) mean of q - f, float64; a constant one makes whole images drift.
    """

    timesteps: Tensor
    relative: Tensor
    bias: Tensor

    @property
    def summary(self) -> float:
        """Mean of `relative` over the calls with t > 0, or over all of them where there is no other.

        At t = 0 the noise is ill-posed and hardly moves the image, yet it would dominate the mean.

        >>> NoiseError(torch.tensor([500.0, 250.0, 0.0]), torch.tensor([0.1, 0.3, 9.0]), torch.zeros(3)).summary
        0.2
        """
        later = self.timesteps > 0
        return float(self.relative[later].mean() if later.any() else self.relative.mean())


@dataclass(frozen=True)
class ImageError:
    """Distance of two sets of images from the same noise.

    Errors are of the samples clipped to [-1, 1], which is what a picture shows of them, and ratios in dB of the same,
    2 being their peak. Means and ratios over all images at once are ruled by the worst ones: the median and the worst
    image stand beside them.

    Attributes:
        mse: mean squared difference of all images.
        mse_median: median over the images; the lower one of two.
        mse_worst: of the worst image.
        psnr: peak signal-to-noise ratio over all images at once.
        psnr_median: median over the images.
        psnr_worst: of the worst image.
        mse_unclipped: mean squared difference of the samples as they are: a single diverging image rules it.
    """

    mse: float
    mse_median: float
    mse_worst: float
    psnr: float
    psnr_median: float
    psnr_worst: float
    mse_unclipped: float


@torch.no_grad()
def noise_error(full: nn.Module, quantized: nn.Module, trajectories: Trajectories, batch_size: int) -> NoiseError:
    """Compare two denoisers on the inputs that the full-precision sampler visits.

    Args:
        full: full-precision denoiser f.
        quantized: quantized denoiser q.
        trajectories: held-out full-precision trajectories, this rank's share of them.
        batch_size: samples per forward pass.
    """
    sums = []
    numbers = torch.arange(trajectories.num_trajectories)
    for call in range(trajectories.num_steps):
        squared, reference, added, count = 0.0, 0.0, 0.0, 0
        for part in torch.split(numbers, batch_size):
            samples = trajectories.at(torch.full_like(part, call), part)
            target = samples.predict(full).double()
            difference = samples.predict(quantized).double() - target
            squared += float(difference.square().sum())
            reference += float(target.square().sum())
            added += float(difference.sum())
            count += difference.numel()
        sums.append((squared, reference, added, count))
    by_call = total(torch.tensor(sums, dtype=torch.float64)).view(-1, trajectories.halves, 4)
    squares, references, differences, counts = by_call.sum(1).unbind(1)  # (S,) each
    relative = squares / references.clamp(min=torch.finfo(torch.float64).tiny)
    return NoiseError(trajectories.timesteps[:: trajectories.halves].double(), relative, differences / counts)


def image_error(quantized: Tensor, full: Tensor) -> ImageError:
    """Compare samples of two models from the same noise.

    Args:
        quantized: (N, C, H, W) samples of the quantized model, in the model's range.
        full: likewise, of the full-precision model.

    >>> error = image_error(torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), 1.0))
    >>> error.mse, error.psnr, error.mse_unclipped
    (0.0, inf, 4.0)
    """
    q, f = (2 * to_images(x.double()) - 1 for x in (quantized, full))
    by_image = (q - f).square().flatten(1).mean(1)  # (N,)
    ranked = by_image.nan_to_num(torch.inf).sort().values  # an image of NaN is the worst there can be
    found = {"mse": by_image.mean(), "mse_median": ranked[(len(ranked) - 1) // 2], "mse_worst": ranked[-1]}
    ratios = {key.replace("mse", "psnr"): 10 * torch.log10(PEAK**2 / value) for key, value in found.items()}
    unclipped = (quantized.double() - full.double()).square().mean()
    return ImageError(**{key: float(x) for key, x in (found | ratios).items()}, mse_unclipped=float(unclipped))
