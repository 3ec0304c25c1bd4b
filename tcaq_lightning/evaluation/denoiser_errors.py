"""Errors of a quantized denoiser: of its predictions, and of the images sampled with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.functional import mean_squared_error
from torchmetrics.functional.image import peak_signal_noise_ratio

from tcaq_lightning.models.pipelines import to_images
from tcaq_lightning.models.trajectories import Trajectories
from tcaq_lightning.runtime.distributed.collectives import total


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

    Attributes:
        mse: mean squared difference of the samples in the model's own range, [-1, 1] for pixels, not clamped.
        psnr: peak signal-to-noise ratio in dB of the images clamped to [0, 1], over all of them at once.
    """

    mse: float
    psnr: float


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

    >>> image_error(torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), 1.0))
    ImageError(mse=4.0, psnr=inf)
    """
    q, f = quantized.double(), full.double()
    psnr = peak_signal_noise_ratio(to_images(q).contiguous(), to_images(f).contiguous(), data_range=1.0)
    return ImageError(float(mean_squared_error(q.contiguous(), f.contiguous())), float(psnr))
