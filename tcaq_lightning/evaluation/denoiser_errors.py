"""Errors of a quantized denoiser: of its predictions, and of the images sampled with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tcaq_lightning.models.pipelines import to_images
from tcaq_lightning.models.trajectories import Trajectories
from tcaq_lightning.runtime.distributed.collectives import gather

PEAK = 2.0
"""Between the darkest and the brightest pixel of clipped samples."""


@dataclass(frozen=True)
class NoiseError:
    """Error of a quantized denoiser on full-precision trajectories, by sampler step.

    Attributes:
        timesteps: (S,) float64.
        relative: (S,) ||q - f||^2 / ||f||^2 over all trajectories, float64.
        bias: (S,) mean of q - f, float64; a constant one makes whole images drift.
        by_trajectory: (N,) each trajectory's part of `summary`, whose mean it is, float64: for paired comparisons. None
            where trajectories were not told apart.
    """

    timesteps: Tensor
    relative: Tensor
    bias: Tensor
    by_trajectory: Tensor | None = None

    @property
    def summary(self) -> float:
        """Mean of `relative` over the calls with t > 0, or over all of them where there is no other.

        At t = 0 the noise is ill-posed and hardly moves the image, yet it would dominate the mean.

        >>> NoiseError(torch.tensor([500.0, 250.0, 0.0]), torch.tensor([0.1, 0.3, 9.0]), torch.zeros(3)).summary
        0.2
        """
        return float(self.relative[summed_up(self.timesteps)].mean())


@dataclass(frozen=True)
class ImageError:
    """Distance of two sets of images from the same noise.

    Errors are computed from samples clipped to [-1, 1], as a picture shows them; so are the ratios in dB, with a peak
    of 2. The worst images dominate means and ratios over all images, so the median and the worst image are given too.

    Attributes:
        mse: mean squared difference of all images.
        mse_median: median over the images; the lower one of two.
        mse_worst: of the worst image.
        psnr: peak signal-to-noise ratio over all images at once.
        psnr_median: median over the images.
        psnr_worst: of the worst image.
        mse_unclipped: mean squared difference of the samples as they are: a single diverging image rules it.
        by_image: `mse` of each image, for paired comparisons.
    """

    mse: float
    mse_median: float
    mse_worst: float
    psnr: float
    psnr_median: float
    psnr_worst: float
    mse_unclipped: float
    by_image: list[float] = field(default_factory=list)


IMAGE_FIGURES = ("mse", "mse_median", "mse_worst", "psnr", "psnr_median", "psnr_worst", "mse_unclipped")
"""Of `ImageError`, its figures over all images."""


def summed_up(timesteps: Tensor) -> Tensor:
    """(S,) bool: the calls that the summary covers, those with t > 0, or all of them if there is no such call."""
    later = timesteps > 0
    return later if later.any() else torch.ones_like(later)


@torch.no_grad()
def noise_error(full: nn.Module, quantized: nn.Module, trajectories: Trajectories, batch_size: int) -> NoiseError:
    """Compare two denoisers on the inputs that the full-precision sampler visits.

    Args:
        full: full-precision denoiser f.
        quantized: quantized denoiser q.
        trajectories: held-out full-precision trajectories, this rank's share of them.
        batch_size: samples per forward pass.
    """
    numbers = torch.arange(trajectories.num_trajectories)
    calls, values = [], 0
    for call in range(trajectories.num_steps):
        parts = []
        for part in torch.split(numbers, batch_size):
            samples = trajectories.at(torch.full_like(part, call), part)
            target = samples.predict(full).double().flatten(1)
            difference = samples.predict(quantized).double().flatten(1) - target
            values = target.shape[1]
            sums = [difference.square().sum(1), target.square().sum(1), difference.sum(1)]
            parts.append(torch.stack(sums, 1).cpu())  # (B, 3)
        calls.append(torch.cat(parts))
    every = torch.cat(gather(torch.stack(calls)), 1)  # (calls, N, 3), of all ranks' trajectories
    steps = torch.unflatten(every, 0, (-1, trajectories.halves)).sum(1)  # (S, N, 3)
    squares, references, differences = steps.unbind(-1)  # (S, N) each
    references = references.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    relative = squares / references
    timesteps = trajectories.timesteps[:: trajectories.halves].double()
    return NoiseError(
        timesteps,
        relative.mean(1),
        differences.mean(1) / (values * trajectories.halves),
        relative[summed_up(timesteps)].mean(0),
    )


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
    figures = {key: float(x) for key, x in (found | ratios).items()}
    return ImageError(**figures, mse_unclipped=float(unclipped), by_image=by_image.tolist())
