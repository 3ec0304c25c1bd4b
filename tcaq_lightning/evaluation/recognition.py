"""The class of a generated image, judged by its features: linear discriminant analysis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tcaq_lightning.errors import UserError

CLASSES_FILE = "classes.safetensors"


@dataclass(frozen=True)
class ClassStatistics:
    """Gaussians of the features of each class of real images, with a common covariance."""

    means: Tensor
    """float64 (K, F)."""
    covariance: Tensor
    """float64 (F, F), within the classes, with N - K in the denominator."""

    @classmethod
    def from_features(cls, features: Tensor, labels: Tensor) -> ClassStatistics:
        """Statistics of feature vectors.

        Args:
            features: (N, F).
            labels: int64 (N,) in 0..K-1; each of them occurs.

        >>> ClassStatistics.from_features(torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([0, 0, 1])).means
        tensor([[2.],
                [7.]], dtype=torch.float64)
        """
        features, num_classes = features.double().cpu(), int(labels.max()) + 1
        means = torch.stack([features[labels == k].mean(dim=0) for k in range(num_classes)])
        centred = features - means[labels]
        return cls(means, centred.T @ centred / (len(features) - num_classes))

    def predict(self, features: Tensor) -> Tensor:
        """The class whose Gaussian is likeliest, all classes being equally common (Fisher 1936).

        argmax_k  m_k^T S^-1 x - m_k^T S^-1 m_k / 2

        Args:
            features: (N, F).

        Returns:
            int64 (N,).
        """
        directions = torch.linalg.solve(self.covariance, self.means.T)  # (F, K)
        scores: Tensor = features.double().cpu() @ directions - 0.5 * (self.means * directions.T).sum(dim=1)
        return scores.argmax(dim=1)

    def save(self, path: Path) -> None:
        """Write the statistics as safetensors."""
        save_file({"means": self.means.contiguous(), "covariance": self.covariance.contiguous()}, path)

    @classmethod
    def load(cls, path: Path) -> ClassStatistics:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or other contents.
        """
        try:
            tensors = load_file(path)
            means, covariance = tensors["means"].double(), tensors["covariance"].double()
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(
                f"expected class statistics (means, covariance) in {path}, got {' '.join(str(error).split())[:200]}; "
                "write them with python -m tcaq_lightning.zoo.pretraining.classifier"
            ) from None
        if means.ndim != 2 or covariance.shape != (means.shape[1], means.shape[1]):
            raise UserError(
                f"expected means (K, F) and a covariance (F, F) in {path}, got {tuple(means.shape)} and "
                f"{tuple(covariance.shape)}; write the statistics again"
            )
        return cls(means, covariance)
