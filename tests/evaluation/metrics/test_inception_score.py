from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tcaq_lightning.evaluation.metrics.inception_score import inception_score


def gaussian(n: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=rng) @ torch.randn(width, width, generator=rng) + shift


def test_inception_score_is_its_formula() -> None:
    logits = gaussian(60, 7, seed=0)
    p = np.exp(logits.double().numpy())
    p /= p.sum(axis=1, keepdims=True)
    total = 0.0
    for row in p:
        total += sum(
            value * (math.log(value) - math.log(mean)) for value, mean in zip(row, p.mean(axis=0), strict=True)
        )
    whole = inception_score(logits, splits=1, seed=0)
    assert whole == {"mean": pytest.approx(math.exp(total / len(p)), rel=1e-9), "std": 0.0, "splits": 1}
    parts = inception_score(logits, splits=4, seed=0)
    assert 1 < parts["mean"] < whole["mean"]  # fewer images hold fewer classes
    assert parts["std"] > 0
    assert inception_score(torch.zeros(6, 3), 2, 0)["mean"] == pytest.approx(1)
