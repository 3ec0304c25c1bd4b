"""Improved precision and recall of generated images (Kynkaanniemi et al. 2019)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcaq_lightning.config import EvaluationConfig
from tcaq_lightning.evaluation.metrics.base import METRICS, Given, Metric, Record, Row, decimals

ROWS = 1024
"""Rows of the matrix of distances that are in memory at a time."""


@METRICS.register("precision_recall")
class PrecisionRecall(Metric):
    """Improved precision and recall."""

    label = "precision, recall"
    needs = ("pooled",)
    reference_needs = ("features",)

    def least_images(self, config: EvaluationConfig) -> tuple[int, str]:
        """An image and its k neighbours."""
        return config.neighbours + 1, "evaluation.neighbours + 1"

    def compute(self, given: Given) -> dict[str, Any]:
        """`precision` and `recall`, `k` and the number of real images, `num_real`."""
        real, k = given.reference.features, given.config.neighbours
        assert real is not None
        return {**precision_recall(real, given.features["pooled"], k)._asdict(), "k": k, "num_real": len(real)}

    def row(self, record: Record) -> Row:
        """Both shares."""
        text = f"{decimals(record['precision'], 4)}, {decimals(record['recall'], 4)} (k = {record['k']})"
        return Row(self.label, text, {key: record[key] for key in ("precision", "recall")})


class Shares(NamedTuple):
    """Shares of images, in [0, 1]."""

    precision: float
    """Of the generated images that lie within the manifold of the real ones."""
    recall: float
    """Of the real images that lie within the manifold of the generated ones."""


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> Shares:
    """Precision and recall from features.

    A set's manifold is the union of the balls around its members that reach to their k-th nearest other member
    (Kynkaanniemi et al. 2019, eq. 1 and 2).

    Args:
        real: (N, F) features of real images.
        fake: (M, F) features of generated images.
        k: nearest neighbours, less than N and M.

    Raises:
        ValueError: fewer than k + 1 images, or another F.

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> precision_recall(x, x + 2.0, k=1)
    Shares(precision=0.75, recall=0.75)
    """
    if min(len(real), len(fake)) <= k or k < 1 or real.shape[1:] != fake.shape[1:]:
        raise ValueError(f"expected more than k = {k} >= 1 features each, got {tuple(real.shape)}, {tuple(fake.shape)}")
    real, fake = real.double(), fake.double()
    centre = real.mean(dim=0)  # distances by squares and products lose the fewest digits near the origin
    real, fake = real - centre, fake - centre
    return Shares(_covered(fake, real, _radii(real, k)), _covered(real, fake, _radii(fake, k)))


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other row, (N,)."""
    radii = []
    for start in range(0, len(x), ROWS):
        distances = torch.cdist(x[start : start + ROWS], x)
        here = torch.arange(len(distances))
        distances[here, start + here] = torch.inf
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of the points in any of the balls."""
    inside = [(torch.cdist(part, centres) <= radii).any(dim=1) for part in torch.split(points, ROWS)]
    return float(torch.cat(inside).double().mean())
