"""Frechet inception distance with an error bar, against stored statistics of real images."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from tcaq_lightning.config import INCEPTION, EvaluationConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.metrics.base import METRICS, Given, Metric, Record, Row, decimals
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics
from tcaq_lightning.evaluation.torchmetrics_adapters import GivenFeatures

log = logging.getLogger(__name__)

WIDE = 512
"""With more features than that, the interval is the bootstrap's limit instead of the bootstrap itself."""


class FrechetMetric(Metric):
    """A Frechet distance with its interval."""

    def distance(self, given: Given, features: str, reference: ReferenceStatistics | None) -> dict[str, Any]:
        """`value`, the ends `low` and `high` of its interval, and `num_samples`.

        Args:
            given: features and settings.
            features: which of them.
            reference: the same of real images.
        """
        assert reference is not None
        # An extractor of one's own has few features, and enough images for them are no burden.
        few = given.config.features == INCEPTION
        result = frechet_distance(given.features[features], reference, seed=given.seed, allow_few=few)
        return dataclasses.asdict(result)

    def row(self, record: Record) -> Row:
        """The distance with its interval, where there is one."""
        low, high = (decimals(record[key], 3) for key in ("low", "high"))
        interval = "" if record["low"] is None else f" [{low}, {high}]"
        text = f"{decimals(record['value'], 3)}{interval}, {record['num_samples']} samples"
        return Row(self.label, text, {self.name: record["value"]})


@METRICS.register("fid")
class FID(FrechetMetric):
    """Frechet inception distance (Heusel et al. 2017)."""

    label = "FID"
    needs = ("pooled",)
    reference_needs = ("statistics",)

    def check_number(self, number: int, what: str, config: EvaluationConfig, width: int) -> None:
        """With an extractor of one's own there must be more images than features."""
        if config.features != INCEPTION and number <= width:
            raise UserError(f"{what} must be 0 or more than the {width} features of {config.features}, got {number}")

    def compute(self, given: Given) -> dict[str, Any]:
        """As in `distance`, of pooled features."""
        return self.distance(given, "pooled", given.reference.statistics)


@METRICS.register("sfid")
class SpatialFID(FrechetMetric):
    """Frechet distance of spatial features (Nash et al. 2021)."""

    label = "sFID"
    needs = ("spatial",)
    reference_needs = ("spatial",)

    def compute(self, given: Given) -> dict[str, Any]:
        """As in `distance`, of spatial features."""
        return self.distance(given, "spatial", given.reference.spatial)


@dataclass(frozen=True)
class FIDResult:
    """A distance with its 95 % interval; the ends are NaN where there are too few samples for one."""

    value: float
    low: float
    high: float
    num_samples: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], {self.num_samples} samples"


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
    # Its features are all there already: a metric that synchronises would wait for ranks that compute none.
    metric = FrechetInceptionDistance(
        feature=extractor, reset_real_features=False, normalize=True, sync_on_compute=False
    )
    # Only mean and covariance count: any number of images leads back to them.
    n, mean = reference.count or 2, reference.mean.to(metric.real_features_sum)
    metric.real_features_sum = n * mean
    metric.real_features_cov_sum = (n - 1) * reference.covariance.to(mean) + n * torch.outer(mean, mean)
    metric.real_features_num_samples = torch.tensor(n, device=mean.device)
    return metric


def frechet_distance(
    features: Tensor, reference: ReferenceStatistics, resamples: int = 100, seed: int = 0, allow_few: bool = False
) -> FIDResult:
    """FID of generated images from their features, with a bootstrap interval.

    ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))   (Heusel et al. 2017, eq. 6)

    The interval is value +- 1.96 standard deviations over resampled sets of the generated images (Efron 1979).
    Percentiles of the resampled distances would not do: FID falls with the number of distinct images, so resampled
    sets are biased upwards. The interval says how far another seed's images may move the value; it does not cover
    the bias of FID at this number of samples nor the spread of the reference. With more than `WIDE` features, where
    resampling would take hours, the standard deviation is the one that the bootstrap's tends to with many samples,
    that of the influences of single images (the infinitesimal jackknife, Efron 1982).

    Args:
        features: (N, F) of the generated images.
        reference: statistics of real images under the same extractor.
        resamples: bootstrap sets, at least 2.
        seed: of the resampling.
        allow_few: with F samples or fewer give a value all the same, with a warning and without an interval.

    Returns:
        The distance and its interval, the lower end not below 0.

    Raises:
        UserError: too few samples, features that are not finite, or another F than the reference's.
    """
    width = len(reference.mean)
    _check_features(features, width, 2 if allow_few else width + 1)
    features = features.double().cpu()
    if len(features) <= width:
        log.warning(
            "Frechet distance of %d samples by %d features: far above that of many samples, and not comparable with "
            "published figures",
            len(features),
            width,
        )
        return FIDResult(_few_samples_distance(features, reference), torch.nan, torch.nan, len(features))
    metric = fid_metric(GivenFeatures(width), reference)
    metric.update(features, real=False)
    value = max(0.0, float(metric.compute()))
    if width > WIDE:
        spread = 1.96 * influence_deviation(features, reference)
    else:
        spread = 1.96 * float(_bootstrap(features, reference, resamples, seed).std())
    return FIDResult(value, max(0.0, value - spread), value + spread, len(features))


def _check_features(features: Tensor, width: int, least: int) -> None:
    """Check that a distance can be computed: at least `least` rows of `width` finite features."""
    if features.ndim != 2 or features.shape[1] != width:
        raise UserError(
            f"expected features (N, {width}), as in the reference statistics, got {tuple(features.shape)}; "
            "take both from the same extractor"
        )
    if len(features) < least:
        raise UserError(
            f"expected at least {least} samples for a covariance of {width} features, got {len(features)}; "
            "generate more images (evaluation.fid_samples)"
        )
    bad = int((~features.isfinite()).any(dim=1).sum())
    if bad:
        raise UserError(
            f"expected finite features, got NaN or infinity for {bad} of {len(features)} samples; "
            "check the generated images, the model may have diverged"
        )


def _few_samples_distance(features: Tensor, reference: ReferenceStatistics) -> float:
    """The same distance from an (N, N) matrix: S1 = X^T X, and X S2 X^T has the eigenvalues of S1 S2 but for zeros."""
    mean = features.mean(dim=0)
    x = (features - mean) / (len(features) - 1) ** 0.5
    cross = torch.linalg.eigvalsh(x @ reference.covariance @ x.T).clamp_min(0).sqrt().sum()
    traces = x.square().sum() + reference.covariance.trace()
    return max(0.0, float((mean - reference.mean).square().sum() + traces - 2 * cross))


def influence_deviation(features: Tensor, reference: ReferenceStatistics) -> float:
    """Standard deviation of FID over sets of generated images, by the infinitesimal jackknife.

    An image x moves the distance by 2 (m1 - m2) (x - m1) + (x - m1)^T A (x - m1) - tr(A S1) over N, where
    A = 1 - R (R S1 R)^(-1/2) R with R = S2^(1/2) is the derivative with respect to S1.

    Args:
        features: float64 (N, F), N > F.
        reference: statistics of real images.
    """
    n = len(features)
    mean = features.mean(dim=0)
    x = features - mean
    covariance = x.T @ x / (n - 1)
    root = _square_root(reference.covariance)
    values, vectors = torch.linalg.eigh(root @ covariance @ root)
    # Directions that either set does not have: their share in the distance does not depend on the others.
    inverse = torch.where(values > values[-1] * len(values) * torch.finfo(values.dtype).eps, values, torch.inf).rsqrt()
    half = root @ vectors * inverse.sqrt()
    quadratic = x.square().sum(dim=1) - (x @ half).square().sum(dim=1)
    influence = 2 * x @ (mean - reference.mean) + quadratic - quadratic.mean()
    return float(influence.square().sum().sqrt() / n)


def _square_root(covariance: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root


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
    root = _square_root(covariance2)
    cross = torch.linalg.eigvalsh(root @ covariance1 @ root).clamp_min(0).sqrt().sum(dim=-1)
    traces = covariance1.diagonal(dim1=-2, dim2=-1).sum(dim=-1) + covariance2.trace()
    distance: Tensor = (mean1 - mean2).square().sum(dim=-1) + traces - 2 * cross
    return distance
