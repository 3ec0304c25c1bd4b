from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from tcaq_lightning.config import EvaluationConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.metrics.base import METRICS, find_metric
from tcaq_lightning.evaluation.metrics.inception_score import inception_score
from tcaq_lightning.evaluation.metrics.kid import kernel_distance
from tcaq_lightning.evaluation.reference import Reference
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics
from tcaq_lightning.evaluation.scores import check_metrics, row_of, score


def gaussian(n: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=rng) @ torch.randn(width, width, generator=rng) + shift


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
        "pooled": gaussian(40, 6, 0, 0.4),
        "spatial": gaussian(40, 9, 1, 0.2),
        "logits": gaussian(40, 5, 2),
        "clip": torch.rand(40) * 30,
    }
    real = {"pooled": gaussian(60, 6, 3), "spatial": gaussian(60, 9, 4)}
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
    assert values["fid"]["value"] == pytest.approx(scipy_fid(fake["pooled"], real["pooled"]), rel=1e-5)
    assert values["sfid"]["value"] == pytest.approx(scipy_fid(fake["spatial"], real["spatial"]), rel=1e-5)
    assert values["is"] == inception_score(fake["logits"], 2, 0)
    assert values["kid"] == kernel_distance(real["pooled"], fake["pooled"], 3, 20, 0)
    assert 0 <= values["precision_recall"]["precision"] <= 1
    assert values["precision_recall"]["num_real"] == 60
    assert values["clip"]["mean"] == pytest.approx(float(fake["clip"].mean()))
    assert values["clip"]["std_error"] == pytest.approx(float(fake["clip"].std()) / 40**0.5)
    assert values["fid"]["low"] < values["fid"]["value"] < values["fid"]["high"]
    assert values["sfid"]["num_samples"] == 40


def test_diverged_images_have_no_scores(caplog: pytest.LogCaptureFixture) -> None:
    fake, reference, config, _ = everything()
    fake["logits"][3, 2] = torch.nan
    with caplog.at_level(logging.WARNING):
        assert score("quantized", fake, reference, config, seed=0) == {}
    assert "quantized" in caplog.text


def test_statistics_alone_are_enough_for_fid() -> None:
    fake, _, _, real = everything()
    statistics = ReferenceStatistics.from_features(real["pooled"])
    config: Any = EvaluationConfig(features="inception")
    unknown = Reference(ReferenceStatistics(statistics.mean, statistics.covariance, None))
    known = score("images", fake, Reference(statistics), config, 0)["fid"]["value"]
    assert score("images", fake, unknown, config, 0)["fid"]["value"] == pytest.approx(known, rel=1e-9)


def test_rank_zero_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone computes scores; torchmetrics would exchange features that the other ranks do not have."""
    fake, reference, config, _ = everything()
    expected = score("images", fake, reference, config, seed=0)
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    monkeypatch.setattr("torchmetrics.metric.gather_all_tensors", lambda *_, **__: pytest.fail("a collective"))
    assert score("images", fake, reference, config, seed=0) == expected


def test_figures_are_shown_by_their_metric_or_as_they_are() -> None:
    assert row_of("kid", {"mean": 0.5, "std": None, "subsets": 1, "subset_size": 9}).text == (
        "0.50000 ± - over 1 subsets of 9"
    )
    row = row_of("of_an_extension", {"mean": 0.5, "note": "text", "worst": None})
    assert (row.label, row.text) == ("of_an_extension", "mean 0.5000, worst -")
    assert row.values == {"of_an_extension_mean": 0.5, "of_an_extension_worst": None}
    with pytest.raises(ValueError, match=r"expected the figures of fid, got \{'mean': 1\}"):
        row_of("fid", {"mean": 1})


def test_needs_of_a_metric_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METRICS["kid"], "needs", ("pixels",))
    with pytest.raises(UserError, match=r"metric kid: needs must be some of pooled, spatial, logits, got pixels"):
        find_metric("kid")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"metrics": ["fid", "beauty"]},
            r"evaluation\.metrics: unknown metric 'beauty'; expected one of clip, .*fid",
        ),
        ({"metrics": ["sfid"]}, r"evaluation\.features must be inception for sfid, got 'fashion-mnist-features'"),
        ({"metrics": ["is"]}, r"evaluation\.features must be inception for is"),
        ({"metrics": ["clip"]}, r"evaluation\.clip_model must be given for clip, got None"),
        ({"metrics": ["clip"], "clip_model": "here"}, r"evaluation\.clip_prompts must be given for clip"),
    ],
)
def test_settings_that_a_metric_cannot_work_with(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        check_metrics(EvaluationConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "number", "text"),
    [
        (
            {"metrics": ["kid"]},
            999,
            r"evaluation\.fid_samples must be at least 1000 for kid .*subset_size.*got 999",
        ),
        ({"metrics": ["precision_recall"]}, 3, r"at least 4 for precision_recall \(evaluation\.neighbours \+ 1\)"),
        ({"metrics": ["fid"]}, 64, "must be 0 or more than the 64 features of fashion-mnist-features, got 64"),
    ],
)
def test_too_few_images(settings: dict[str, Any], number: int, text: str) -> None:
    config = EvaluationConfig(**settings)
    (metric,) = check_metrics(config)
    with pytest.raises(UserError, match=text):
        metric.check_number(number, "evaluation.fid_samples", config, width=64)
    metric.check_number(2000, "evaluation.fid_samples", config, width=64)
