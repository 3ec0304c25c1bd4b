"""Kernel inception distance."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance

from tcaq_lightning.config import EvaluationConfig
from tcaq_lightning.evaluation.metrics.base import METRICS, Given, Metric, Record, Row, decimals
from tcaq_lightning.evaluation.torchmetrics_adapters import GivenFeatures, quiet_and_seeded


@METRICS.register("kid")
class KID(Metric):
    """Kernel inception distance (Binkowski et al. 2018), mean and deviation over random subsets."""

    label = "KID"
    needs = ("pooled",)
    reference_needs = ("features",)

    def least_images(self, config: EvaluationConfig) -> tuple[int, str]:
        """A subset."""
        return config.kid_subset_size, "evaluation.kid_subset_size"

    def compute(self, given: Given) -> dict[str, Any]:
        """`mean` and `std` over the `subsets` of `subset_size` images."""
        real, config = given.reference.features, given.config
        assert real is not None
        return kernel_distance(real, given.features["pooled"], config.kid_subsets, config.kid_subset_size, given.seed)

    def row(self, record: Record) -> Row:
        """Mean and deviation."""
        figures = f"{decimals(record['mean'], 5)} ± {decimals(record['std'], 5)}"
        text = f"{figures} over {record['subsets']} subsets of {record['subset_size']}"
        return Row(self.label, text, {self.name: record["mean"]})


def kernel_distance(real: Tensor, fake: Tensor, subsets: int, subset_size: int, seed: int) -> dict[str, Any]:
    """KID from features: the unbiased squared MMD with the kernel (x y / F + 1)^3.

    Binkowski et al. 2018, section 4.1.

    Args:
        real: (N, F).
        fake: (M, F).
        subsets: their number.
        subset_size: images of either kind in each subset, at most N and M.
        seed: of the subsets.

    Returns:
        `mean` and `std` over the subsets, `subsets` and `subset_size`.
    """
    with quiet_and_seeded(seed):
        metric = KernelInceptionDistance(
            feature=GivenFeatures(), subsets=subsets, subset_size=subset_size, sync_on_compute=False
        )
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        mean, deviation = metric.compute()
    return {"mean": float(mean), "std": float(deviation), "subsets": subsets, "subset_size": subset_size}
