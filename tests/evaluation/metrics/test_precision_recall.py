from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcaq_lightning.evaluation.metrics import precision_recall as module
from tcaq_lightning.evaluation.metrics.precision_recall import precision_recall


def points(count: int, width: int, seed: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def brute_force(centres: Tensor, others: Tensor, k: int) -> float:
    """Share of `others` in the manifold of `centres`, by loops over single distances."""
    radii = []
    for i, a in enumerate(centres):
        distances = sorted(float((a - b).double().square().sum()) for j, b in enumerate(centres) if j != i)
        radii.append(distances[k - 1])
    inside = [
        any(float((x - a).double().square().sum()) <= r for a, r in zip(centres, radii, strict=True)) for x in others
    ]
    return sum(inside) / len(inside)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(6, 20),
    m=st.integers(6, 20),
    width=st.integers(1, 5),
    k=st.integers(1, 5),
    seed=st.integers(0, 99),
    shift=st.floats(-2, 2),
)
def test_agrees_with_brute_force(n: int, m: int, width: int, k: int, seed: int, shift: float) -> None:
    real, fake = points(n, width, seed), points(m, width, seed + 1, spread=0.7) + shift
    assert precision_recall(real, fake, k) == (brute_force(real, fake, k), brute_force(fake, real, k))


def test_many_features_and_rows_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 25 rows distances are computed by matrix products."""
    monkeypatch.setattr(module, "ROWS", 7)
    real, fake = points(40, 16, seed=0) + 50, points(30, 16, seed=1) + 50.2
    values = precision_recall(real, fake, 3)
    assert values == (brute_force(real, fake, 3), brute_force(fake, real, 3))
    assert 0 < values.precision < 1


def test_limits() -> None:
    x = points(10, 3, seed=0)
    assert precision_recall(x, x.clone(), 3) == (1, 1)
    assert precision_recall(x, x + 100, 3) == (0, 0)
    # A few typical images are all real ones' neighbours, and have few of them for neighbours.
    narrow = precision_recall(points(40, 2, seed=0), points(40, 2, seed=1, spread=0.05), 3)
    assert narrow.precision > 0.9
    assert narrow.recall < 0.3


def test_too_few() -> None:
    with pytest.raises(ValueError, match="more than k = 3"):
        precision_recall(points(3, 2, 0), points(9, 2, 0), 3)
    with pytest.raises(ValueError, match=r"\(9, 3\)"):
        precision_recall(points(9, 2, 0), points(9, 3, 0), 3)
