"""From features to figures: FID, sFID, IS, KID, precision and recall, CLIP score, each image's features taken once."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from tcaq_lightning.config import INCEPTION, EvaluationConfig
from tcaq_lightning.evaluation.metrics.fid import FIDResult, ReferenceStatistics, frechet_distance
from tcaq_lightning.evaluation.metrics.precision_recall import precision_recall
from tcaq_lightning.evaluation.reference import Reference

log = logging.getLogger(__name__)


def score(
    name: str, features: Mapping[str, Tensor], reference: Reference, config: EvaluationConfig, seed: int
) -> dict[str, Any]:
    """All metrics of a set of images.

    Args:
        name: of the images, for messages.
        features: by name (N, F), as `FeatureSpace` gives them.
        reference: real images, with all that the metrics need.
        config: which metrics, and their settings.
        seed: of resampling, of KID's subsets and of the inception score's parts.

    Returns:
        By metric: a `FIDResult` for fid and sfid, else a dictionary of figures. Empty if features are not finite.
    """
    if not all(values.isfinite().all() for values in features.values()):
        log.warning(
            "no %s of the %s: some of its images are NaN, its sampling diverged",
            ", ".join(m if m != "fid" else "FID" for m in config.metrics),
            name,
        )
        return {}
    given = _Given(features, reference, config, seed)
    return {metric: SCORES[metric](given) for metric in config.metrics}


def plain(scores: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-ready scores."""
    return {k: dataclasses.asdict(v) if isinstance(v, FIDResult) else v for k, v in scores.items()}


class _PassedOn(nn.Module):
    """Stands in for torchmetrics' extractors where the features are already there."""

    def forward(self, features: Tensor) -> Tensor:
        return features


@dataclass(frozen=True)
class _Given:
    """What every metric is computed from."""

    features: Mapping[str, Tensor]
    reference: Reference
    config: EvaluationConfig
    seed: int


@contextmanager
def _quiet_seeded(seed: int) -> Iterator[None]:
    """torchmetrics draws from the global generator, and warns that it keeps features and of a single part's spread."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer.*")
        warnings.filterwarnings("ignore", message=r"std\(\): degrees of freedom is <= 0.*")
        torch.manual_seed(seed)
        yield


def _fid(given: _Given) -> FIDResult:
    return _distance(given, "features", given.reference.statistics)


def _sfid(given: _Given) -> FIDResult:
    """The Frechet distance of spatial features (Nash et al. 2021)."""
    return _distance(given, "spatial", given.reference.spatial)


def _distance(given: _Given, name: str, statistics: ReferenceStatistics | None) -> FIDResult:
    assert statistics is not None
    # An own extractor has few features, and enough images for them are no burden.
    few = given.config.features == INCEPTION
    return frechet_distance(given.features[name], statistics, seed=given.seed, allow_few=few)


def inception_score(logits: Tensor, splits: int, seed: int) -> dict[str, Any]:
    """exp E KL(p(y|x) || p(y)) (Salimans et al. 2016), mean and deviation over parts of the images.

    Args:
        logits: (N, classes).
        splits: number of parts, at most N.
        seed: of the images' order.
    """
    with _quiet_seeded(seed):
        metric = InceptionScore(feature=_PassedOn(), splits=splits, sync_on_compute=False)
        metric.update(logits.double())
        mean, deviation = metric.compute()
    # torch's standard deviation of a single value is NaN.
    return {"mean": float(mean), "std": float(deviation) if splits > 1 else 0.0, "splits": splits}


def kernel_distance(real: Tensor, fake: Tensor, subsets: int, subset_size: int, seed: int) -> dict[str, Any]:
    """KID: the unbiased squared MMD with the kernel (x y / F + 1)^3 (Binkowski et al. 2018), over random subsets.

    Args:
        real: (N, F). fake: (M, F).
        subsets: their number. subset_size: images of either kind in each, at most N and M.
        seed: of the subsets.
    """
    with _quiet_seeded(seed):
        metric = KernelInceptionDistance(
            feature=_PassedOn(), subsets=subsets, subset_size=subset_size, sync_on_compute=False
        )
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        mean, deviation = metric.compute()
    return {"mean": float(mean), "std": float(deviation), "subsets": subsets, "subset_size": subset_size}


def _is(given: _Given) -> dict[str, Any]:
    return inception_score(given.features["logits"], given.config.is_splits, given.seed)


def _kid(given: _Given) -> dict[str, Any]:
    real, fake, config = given.reference.features, given.features["features"], given.config
    assert real is not None
    return kernel_distance(real, fake, config.kid_subsets, config.kid_subset_size, given.seed)


def _precision_recall(given: _Given) -> dict[str, Any]:
    real = given.reference.features
    assert real is not None
    values = precision_recall(real, given.features["features"], given.config.neighbours)
    return {**values._asdict(), "k": given.config.neighbours, "num_real": len(real)}


def _clip(given: _Given) -> dict[str, Any]:
    scores = given.features["clip"].double()
    deviation = float(scores.std()) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
    return {"mean": float(scores.mean()), "std_error": deviation, "num_samples": len(scores)}


SCORES: dict[str, Callable[[_Given], Any]] = {
    "fid": _fid,
    "sfid": _sfid,
    "is": _is,
    "kid": _kid,
    "precision_recall": _precision_recall,
    "clip": _clip,
}
