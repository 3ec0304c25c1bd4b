"""Let torchmetrics compute from existing features."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class GivenFeatures(nn.Module):
    """Stands in for torchmetrics' extractors: returns its input.

    Args:
        num_features: length of a feature vector, for metrics that ask.
    """

    def __init__(self, num_features: int | None = None) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """(N, F) to the same."""
        return features


@contextmanager
def quiet_and_seeded(seed: int) -> Iterator[None]:
    """Seed the global generator, which torchmetrics draws from, and leave it as it was afterwards.

    Its warnings that it keeps features, and of the deviation of a single part, are left out.

    Args:
        seed: of what is drawn.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer.*")
        warnings.filterwarnings("ignore", message=r"std\(\): degrees of freedom is <= 0.*")
        torch.manual_seed(seed)
        yield
