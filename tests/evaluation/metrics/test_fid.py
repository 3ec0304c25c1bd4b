from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.metrics import fid
from tcaq_lightning.evaluation.metrics.fid import fid_metric, frechet_distance, influence_deviation
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics


def gaussian(n: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=rng, dtype=torch.float64)
    return torch.randn(n, width, generator=rng, dtype=torch.float64) @ mixing + shift


def scipy_fid(first: Tensor, second: Tensor) -> float:
    a, b = first.numpy(), second.numpy()
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * np.real(root)))


@settings(max_examples=15, deadline=None)
@given(width=st.integers(2, 12), seed=st.integers(0, 1000), shift=st.floats(-3, 3))
def test_agrees_with_scipy(width: int, seed: int, shift: float) -> None:
    fake, real = gaussian(80, width, seed), gaussian(120, width, seed + 1, shift)
    result = frechet_distance(fake, ReferenceStatistics.from_features(real), resamples=2)
    assert result.value == pytest.approx(scipy_fid(fake, real), rel=1e-6, abs=1e-6)
    assert result.num_samples == 80


def test_same_features_are_at_distance_zero() -> None:
    features = gaussian(300, 8, seed=0)
    assert frechet_distance(features, ReferenceStatistics.from_features(features)).value == pytest.approx(0, abs=1e-6)


def test_float32_features_lose_nothing_to_a_large_mean() -> None:
    features = (gaussian(200, 4, seed=0) + 1000).float()
    real = gaussian(200, 4, seed=0, shift=1001)
    result = frechet_distance(features, ReferenceStatistics.from_features(real))
    assert result.value == pytest.approx(4.0, abs=0.01)


def test_interval_covers_other_seeds() -> None:
    rng = torch.Generator().manual_seed(0)
    reference = ReferenceStatistics(torch.zeros(4).double(), torch.eye(4).double(), 10_000)
    results = [
        frechet_distance(torch.randn(400, 4, generator=rng).double() + 0.5, reference, resamples=50) for _ in range(60)
    ]
    values = np.array([r.value for r in results])
    covered = np.mean([r.low <= values.mean() <= r.high for r in results])
    assert covered >= 0.85
    half_widths = np.array([(r.high - r.low) / 2 for r in results])
    assert half_widths.mean() == pytest.approx(1.96 * values.std(ddof=1), rel=0.35)


def test_interval_is_reproducible_and_not_negative() -> None:
    features = gaussian(100, 4, seed=0)
    reference = ReferenceStatistics.from_features(features)
    assert frechet_distance(features, reference) == frechet_distance(features, reference)
    assert frechet_distance(features, reference).low == 0


def test_bootstrap_agrees_with_a_loop() -> None:
    features, real = gaussian(60, 3, seed=0), gaussian(60, 3, seed=1)
    result = frechet_distance(features, ReferenceStatistics.from_features(real), resamples=10, seed=3)
    draws = torch.randint(60, (10, 60), generator=torch.Generator().manual_seed(3))
    spread = np.std([scipy_fid(features[draw], real) for draw in draws], ddof=1)
    assert (result.high - result.value) == pytest.approx(1.96 * spread, rel=1e-6)


class _Means(nn.Module):
    num_features = 2

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([images.mean(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3))], dim=1)


def test_metric_hands_on_images_unchanged_and_keeps_the_reference() -> None:
    rng = torch.Generator().manual_seed(0)
    real, fake = (torch.rand(200, 1, 4, 4, generator=rng) * 2 - 1 for _ in range(2))
    reference = ReferenceStatistics.from_features(_Means()(real))
    metric = fid_metric(_Means(), reference)
    expected = scipy_fid(_Means()(fake).double(), _Means()(real).double())
    for _ in range(2):
        for batch in fake.split(64):
            metric.update(batch, real=False)
        assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)
        metric.reset()


def test_statistics_round_trip(tmp_path: Path) -> None:
    statistics = ReferenceStatistics.from_features(gaussian(50, 5, seed=0))
    statistics.save(tmp_path / "reference.safetensors")
    loaded = ReferenceStatistics.load(tmp_path / "reference.safetensors")
    assert torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(loaded.covariance, statistics.covariance)
    assert loaded.count == 50


def test_bad_statistics(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    with pytest.raises(UserError, match="expected reference statistics"):
        ReferenceStatistics.load(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="expected reference statistics"):
        ReferenceStatistics.load(path)
    ReferenceStatistics(torch.zeros(3), torch.eye(2), 10).save(path)
    with pytest.raises(UserError, match=r"got \(3,\), \(2, 2\) and 10"):
        ReferenceStatistics.load(path)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(4, 4), "at least 5 samples .* got 4"),
        (torch.zeros(50, 3), r"\(N, 4\).* got \(50, 3\)"),
        (torch.zeros(50), r"\(N, 4\)"),
        (torch.full((50, 4), math.nan), "NaN or infinity for 50 of 50"),
        (torch.eye(50, 4) / 0.0, "NaN or infinity"),
    ],
)
def test_user_errors(features: Tensor, message: str) -> None:
    reference = ReferenceStatistics(torch.zeros(4).double(), torch.eye(4).double(), 100)
    with pytest.raises(UserError, match=message) as caught:
        frechet_distance(features, reference)
    assert "\n" not in str(caught.value)


def test_metric_refuses_another_width() -> None:
    with pytest.raises(UserError, match="expected 4 features"):
        fid_metric(_Means(), ReferenceStatistics(torch.zeros(4).double(), torch.eye(4).double(), 100))


@settings(max_examples=10, deadline=None)
@given(n=st.integers(3, 12), width=st.integers(12, 20), seed=st.integers(0, 100))
def test_few_samples_agree_with_scipy(n: int, width: int, seed: int) -> None:
    fake, real = gaussian(n, width, seed), gaussian(200, width, seed + 1, shift=0.5)
    result = frechet_distance(fake, ReferenceStatistics.from_features(real), allow_few=True)
    # scipy's square root of a singular matrix keeps half of the digits
    assert result.value == pytest.approx(scipy_fid(fake, real), rel=1e-4)
    assert math.isnan(result.low)
    assert math.isnan(result.high)


def test_few_samples_are_said_to_be_few(caplog: pytest.LogCaptureFixture) -> None:
    reference = ReferenceStatistics.from_features(gaussian(50, 8, seed=0))
    frechet_distance(gaussian(8, 8, seed=1), reference, allow_few=True)
    assert "8 samples by 8 features" in caplog.text
    with pytest.raises(UserError, match="at least 2 samples"):
        frechet_distance(gaussian(1, 8, seed=1), reference, allow_few=True)


def test_influences_vary_as_other_seeds_do() -> None:
    rng = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=rng, dtype=torch.float64)
    real = torch.randn(2000, 6, generator=rng, dtype=torch.float64)
    sets = [torch.randn(500, 6, generator=rng, dtype=torch.float64) @ mixing + 0.3 for _ in range(200)]
    spread = np.std([scipy_fid(x, real) for x in sets])
    deviations = [influence_deviation(x, ReferenceStatistics.from_features(real)) for x in sets[:20]]
    assert np.mean(deviations) == pytest.approx(spread, rel=0.15)


def test_wide_features_get_their_interval_from_influences(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, reference = gaussian(400, 8, 0, 0.3), ReferenceStatistics.from_features(gaussian(500, 8, 1))
    resampled = frechet_distance(fake, reference, resamples=400)
    monkeypatch.setattr(fid, "WIDE", 4)
    direct = frechet_distance(fake, reference)
    assert direct.value == resampled.value
    assert direct.high - direct.value == pytest.approx(resampled.high - resampled.value, rel=0.15)


def test_directions_without_spread_do_not_disturb_the_interval() -> None:
    fake, real = gaussian(300, 5, 0, 0.2), gaussian(300, 5, 1)
    expected = influence_deviation(fake, ReferenceStatistics.from_features(real))
    wide, flat = (torch.cat([x, torch.zeros(len(x), 2).double()], dim=1) for x in (fake, real))
    assert influence_deviation(wide, ReferenceStatistics.from_features(flat)) == pytest.approx(expected, rel=1e-6)
