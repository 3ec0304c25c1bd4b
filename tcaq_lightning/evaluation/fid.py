"""Frechet inception distance with an error bar, against stored statistics of real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from tcaq_lightning.errors import UserError


@dataclass(frozen=True)
class ReferenceStatistics:
    """Mean and covariance of the features of real images."""

    mean: Tensor
    """float64 (F,)."""
    covariance: Tensor
    """float64 (F, F), with n - 1 in the denominator."""
    count: int
    """Number of images."""

    @classmethod
    def from_features(cls, features: Tensor) -> ReferenceStatistics:
        """Statistics of feature vectors.

        Args:
            features: (N, F), N >= 2.

        >>> ReferenceStatistics.from_features(torch.tensor([[0.0, 1.0], [2.0, 1.0]])).covariance
        tensor([[2., 0.],
                [0., 0.]], dtype=torch.float64)
        """
        features = features.double().cpu()
        mean = features.mean(dim=0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))

    def save(self, path: Path) -> None:
        """Write the statistics as safetensors."""
        tensors = {"mean": self.mean, "covariance": self.covariance, "count": torch.tensor(self.count)}
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path) -> ReferenceStatistics:
        """Read what `save` wrote.

        Args:
            path: the safetensors file.

        Raises:
            UserError: no such file, or other contents.
        """
        try:
            tensors = load_file(path)
            mean, covariance, count = tensors["mean"].double(), tensors["covariance"].double(), int(tensors["count"])
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"expected reference statistics (mean, covariance, count) in {path}, "
                f"got {' '.join(str(error).split())[:200]}; "
                "write them with python -m tcaq_lightning.pretraining.classifier"
            ) from None
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or count < 2:
            raise UserError(
                f"expected a mean (F,), a covariance (F, F) and a count of at least 2 in {path}, "
                f"got {tuple(mean.shape)}, {tuple(covariance.shape)} and {count}; write the statistics again"
            )
        return cls(mean, covariance, count)


@dataclass(frozen=True)
class FIDResult:
    """A distance with its 95 % interval."""

    value: float
    low: float
    high: float
    num_samples: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], {self.num_samples} samples"


class _Features(nn.Module):
    """Stands in for an extractor where the features are already there."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid_metric(extractor: nn.Module, reference: ReferenceStatistics) -> FrechetInceptionDistance:
    """torchmetrics' FID whose real side is the stored statistics.

    torchmetrics hands images to a custom extractor as they are, whatever `normalize` says: give them in the
    extractor's own range. `update(images, real=False)` and `compute()` are all that is needed; `reset()` keeps the
    real side.

    Args:
        extractor: module with `num_features`, from images to (B, num_features).
        reference: statistics of real images under the same extractor.

    Raises:
        UserError: the extractor has another number of features than the reference.
    """
    if extractor.num_features != len(reference.mean):
        raise UserError(
            f"expected {len(reference.mean)} features an image, as in the reference statistics, "
            f"got {extractor.num_features}; take both from the same directory"
        )
    metric = FrechetInceptionDistance(feature=extractor, reset_real_features=False, normalize=True)
    n, mean = reference.count, reference.mean.to(metric.real_features_sum)
    metric.real_features_sum = n * mean
    metric.real_features_cov_sum = (n - 1) * reference.covariance.to(mean) + n * torch.outer(mean, mean)
    metric.real_features_num_samples = torch.tensor(n, device=mean.device)
    return metric


def frechet_distance(
    features: Tensor, reference: ReferenceStatistics, resamples: int = 100, seed: int = 0
) -> FIDResult:
    """FID of generated images from their features, with a bootstrap interval.

    ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))   (Heusel et al. 2017, eq. 6)

    The interval is value +- 1.96 standard deviations over resampled sets of the generated images (Efron 1979).
    Percentiles of the resampled distances would not do: FID falls with the number of distinct images, so resampled
    sets are biased upwards. The interval says how far another seed's images may move the value; it does not cover
    the bias of FID at this number of samples nor the spread of the reference.

    Args:
        features: (N, F) of the generated images.
        reference: statistics of real images under the same extractor.
        resamples: bootstrap sets, at least 2.
        seed: of the resampling.

    Returns:
        The distance and its interval, the lower end not below 0.

    Raises:
        UserError: fewer than F + 1 samples, features that are not finite, or another F than the reference's.
    """
    width = len(reference.mean)
    if features.ndim != 2 or features.shape[1] != width:
        raise UserError(
            f"expected features (N, {width}), as in the reference statistics, got {tuple(features.shape)}; "
            "take both from the same extractor"
        )
    if len(features) < width + 1:
        raise UserError(
            f"expected at least {width + 1} samples for a covariance of {width} features, got {len(features)}; "
            "generate more images (evaluation.fid_samples)"
        )
    bad = int((~features.isfinite()).any(dim=1).sum())
    if bad:
        raise UserError(
            f"expected finite features, got NaN or infinity for {bad} of {len(features)} samples; "
            "check the generated images, the model may have diverged"
        )
    features = features.double().cpu()
    metric = fid_metric(_Features(width), reference)
    metric.update(features, real=False)
    value = max(0.0, float(metric.compute()))
    spread = 1.96 * float(_bootstrap(features, reference, resamples, seed).std())
    return FIDResult(value, max(0.0, value - spread), value + spread, len(features))


def _bootstrap(features: Tensor, reference: ReferenceStatistics, resamples: int, seed: int) -> Tensor:
    """Distances of sets drawn with replacement, (R,)."""
    n = len(features)
    rng = torch.Generator().manual_seed(seed)
    draws = torch.randint(n, (resamples, n), generator=rng)
    counts = torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())
    means = counts @ features / n  # (R, F)
    moments = torch.stack([(features.T * weights) @ features for weights in counts])  # (R, F, F)
    covariances = (moments - n * means.unsqueeze(2) * means.unsqueeze(1)) / (n - 1)
    return _gaussian_distance(means, covariances, reference.mean, reference.covariance)


def _gaussian_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """Batched Frechet distance of Gaussians: tr (S1 S2)^(1/2) from the symmetric S2^(1/2) S1 S2^(1/2)."""
    values, vectors = torch.linalg.eigh(covariance2)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance1 @ root).clamp_min(0).sqrt().sum(dim=-1)
    traces = covariance1.diagonal(dim1=-2, dim2=-1).sum(dim=-1) + covariance2.trace()
    distance: Tensor = (mean1 - mean2).square().sum(dim=-1) + traces - 2 * cross
    return distance
