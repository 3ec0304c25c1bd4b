from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tcaq_lightning.evaluation.metrics.kid import kernel_distance


def gaussian(n: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=rng) @ torch.randn(width, width, generator=rng) + shift


def naive_kid(real: Tensor, fake: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a.double() @ b.double()) / len(a) + 1) ** 3

    n, m = len(real), len(fake)
    value = sum(kernel(real[i], real[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    value += sum(kernel(fake[i], fake[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return value - 2 * sum(kernel(a, b) for a in real for b in fake) / (n * m)


def test_kid_agrees_with_a_double_loop() -> None:
    real, fake = gaussian(15, 6, seed=0), gaussian(15, 6, seed=0, shift=0.5)
    result = kernel_distance(real, fake, subsets=1, subset_size=15, seed=0)
    assert result["mean"] == pytest.approx(naive_kid(real, fake), rel=1e-9)
    subsets = kernel_distance(real, fake, subsets=50, subset_size=8, seed=0)
    assert subsets["std"] > 0
    assert subsets == kernel_distance(real, fake, subsets=50, subset_size=8, seed=0)
    assert subsets != kernel_distance(real, fake, subsets=50, subset_size=8, seed=1)
