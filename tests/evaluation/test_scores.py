from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from tcaq_lightning.config import EvaluationConfig
from tcaq_lightning.evaluation.metrics.fid import FIDResult, ReferenceStatistics
from tcaq_lightning.evaluation.reference import Reference
from tcaq_lightning.evaluation.scores import inception_score, kernel_distance, plain, score


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


def test_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    inception_score(gaussian(8, 3, 0), 2, 0)
    kernel_distance(gaussian(8, 3, 0), gaussian(8, 3, 1), 2, 4, 0)
    assert torch.equal(torch.rand(3), expected)


def scipy_fid(first: Tensor, second: Tensor) -> float:
    a, b = first.double().numpy(), second.double().numpy()
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * np.real(root)))


def everything() -> tuple[dict[str, Tensor], Reference, EvaluationConfig, dict[str, Tensor]]:
    fake = {
        "features": gaussian(40, 6, 0, 0.4),
        "spatial": gaussian(40, 9, 1, 0.2),
        "logits": gaussian(40, 5, 2),
        "clip": torch.rand(40) * 30,
    }
    real = {"features": gaussian(60, 6, 3), "spatial": gaussian(60, 9, 4)}
    config = EvaluationConfig(
        features="inception",
        metrics=["fid", "sfid", "is", "kid", "precision_recall", "clip"],
        clip_model="c",
        clip_prompts="p",
        is_splits=2,
        kid_subsets=3,
        kid_subset_size=20,
    )
    return fake, Reference().completed(real), config, real


def test_every_metric_looks_at_its_own_features() -> None:
    fake, reference, config, real = everything()
    values = score("images", fake, reference, config, seed=0)
    assert list(values) == config.metrics
    assert values["fid"].value == pytest.approx(scipy_fid(fake["features"], real["features"]), rel=1e-5)
    assert values["sfid"].value == pytest.approx(scipy_fid(fake["spatial"], real["spatial"]), rel=1e-5)
    assert values["is"] == inception_score(fake["logits"], 2, 0)
    assert values["kid"] == kernel_distance(real["features"], fake["features"], 3, 20, 0)
    assert 0 <= values["precision_recall"]["precision"] <= 1
    assert values["precision_recall"]["num_real"] == 60
    assert values["clip"]["mean"] == pytest.approx(float(fake["clip"].mean()))
    assert values["clip"]["std_error"] == pytest.approx(float(fake["clip"].std()) / 40**0.5)
    assert isinstance(values["fid"], FIDResult)
    assert plain(values)["sfid"]["num_samples"] == 40


def test_diverged_images_have_no_scores(caplog: pytest.LogCaptureFixture) -> None:
    fake, reference, config, _ = everything()
    fake["logits"][3, 2] = torch.nan
    with caplog.at_level(logging.WARNING):
        assert score("quantized", fake, reference, config, seed=0) == {}
    assert "quantized" in caplog.text


def test_statistics_alone_are_enough_for_fid() -> None:
    fake, _, _, real = everything()
    statistics = ReferenceStatistics.from_features(real["features"])
    config: Any = EvaluationConfig(features="inception")
    unknown = Reference(ReferenceStatistics(statistics.mean, statistics.covariance, None))
    known = score("images", fake, Reference(statistics), config, 0)["fid"].value
    assert score("images", fake, unknown, config, 0)["fid"].value == pytest.approx(known, rel=1e-9)


def test_rank_zero_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone computes scores; torchmetrics would exchange features that the other ranks do not have."""
    fake, reference, config, _ = everything()
    expected = score("images", fake, reference, config, seed=0)
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    monkeypatch.setattr("torchmetrics.metric.gather_all_tensors", lambda *_, **__: pytest.fail("a collective"))
    assert score("images", fake, reference, config, seed=0) == expected
