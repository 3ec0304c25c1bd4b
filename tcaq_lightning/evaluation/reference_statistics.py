"""Mean and covariance of the features of real images: what a Frechet distance compares with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tcaq_lightning.errors import UserError

ROUNDING = 1e-3
"""Of a published covariance, relative to its largest value."""


@dataclass(frozen=True)
class ReferenceStatistics:
    """Mean and covariance of the features of real images."""

    mean: Tensor
    """float64 (F,)."""
    covariance: Tensor
    """float64 (F, F), with n - 1 in the denominator."""
    count: int | None
    """Number of images; None if the file does not tell it."""

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
        tensors = {"mean": self.mean, "covariance": self.covariance, "count": torch.tensor(self.count or 0)}
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
            mean, covariance = tensors["mean"].double(), tensors["covariance"].double()
            count = int(tensors["count"]) or None
        except (OSError, KeyError, RuntimeError, ValueError, OverflowError, SafetensorError) as error:
            raise UserError(
                f"expected reference statistics (mean, covariance, count) in {path}, "
                f"got {' '.join(str(error).split())[:200]}; "
                "write them with python -m tcaq_lightning statistics"
            ) from None
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or (count or 2) < 2:
            raise UserError(
                f"expected a mean (F,), a covariance (F, F) and a count of at least 2 in {path}, "
                f"got {tuple(mean.shape)}, {tuple(covariance.shape)} and {count}; write the statistics again"
            )
        check_gaussian(mean, covariance, str(path))
        return cls(mean, covariance, count)


def check_gaussian(mean: Tensor, covariance: Tensor, where: str) -> None:
    """Check that statistics from a file are a mean and a covariance.

    Args:
        mean: float64, of any shape.
        covariance: likewise.
        where: the file, for messages.

    Raises:
        UserError: wrong shapes, values that are not finite, or a matrix that is not symmetric and positive
            semidefinite, up to rounding.
    """
    got = None
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        got = f"shapes {tuple(mean.shape)} and {tuple(covariance.shape)}"
    elif not mean.isfinite().all() or not covariance.isfinite().all():
        got = "values that are NaN or infinite"
    else:
        largest = covariance.abs().max()
        if float((covariance - covariance.T).abs().max()) > ROUNDING * float(largest):
            got = "a matrix that is not symmetric"
        elif float(torch.linalg.eigvalsh(covariance)[0]) < -ROUNDING * float(largest):
            got = "a matrix with negative variances"
    if got is not None:
        raise UserError(
            f"expected a mean (F,) and a covariance (F, F) in {where}, got {got}; download or write it again"
        )
