"""Inception score: how sure of an image's class a classifier is, and how many classes there are."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.image import inception

from tcaq_lightning.config import EvaluationConfig
from tcaq_lightning.evaluation.metrics.base import METRICS, Given, Metric, Record, Row, decimals
from tcaq_lightning.evaluation.torchmetrics_adapters import GivenFeatures, quiet_and_seeded


@METRICS.register("is")
class InceptionScore(Metric):
    """Inception score (Salimans et al. 2016), mean and deviation over parts of the images."""

    label = "IS"
    needs = ("logits",)

    def least_images(self, config: EvaluationConfig) -> tuple[int, str]:
        """One in every part."""
        return config.is_splits, "evaluation.is_splits"

    def compute(self, given: Given) -> dict[str, Any]:
        """`mean` and `std` over the `splits` parts."""
        return inception_score(given.features["logits"], given.config.is_splits, given.seed)

    def row(self, record: Record) -> Row:
        """Mean and deviation."""
        text = f"{decimals(record['mean'], 3)} ± {decimals(record['std'], 3)} over {record['splits']} parts"
        return Row(self.label, text, {self.name: record["mean"]})


def inception_score(logits: Tensor, splits: int, seed: int) -> dict[str, Any]:
    """Inception score from logits.

    exp E KL(p(y|x) || p(y))   (Salimans et al. 2016, section 4)

    Args:
        logits: (N, classes).
        splits: number of parts, at most N.
        seed: of the images' order.

    Returns:
        `mean` and `std` over the parts, and `splits`.
    """
    with quiet_and_seeded(seed):
        metric = inception.InceptionScore(feature=GivenFeatures(), splits=splits, sync_on_compute=False)
        metric.update(logits.double())
        mean, deviation = metric.compute()
    # torch's standard deviation of a single value is NaN.
    return {"mean": float(mean), "std": float(deviation) if splits > 1 else 0.0, "splits": splits}
