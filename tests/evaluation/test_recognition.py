from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.features import REFERENCE_FILE, SHIPPED
from tcaq_lightning.evaluation.recognition import CLASSES_FILE, ClassStatistics
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics


@pytest.fixture
def samples() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=rng)
    centres = 2 * torch.randn(3, 4, generator=rng)
    mixing = torch.randn(4, 4, generator=rng)
    return centres[labels] + torch.randn(300, 4, generator=rng) @ mixing, labels


def test_predicts_the_likeliest_gaussian(samples: tuple[torch.Tensor, torch.Tensor]) -> None:
    features, labels = samples
    statistics = ClassStatistics.from_features(features, labels)
    features = features.double()
    within = torch.stack([features[i] - features[labels == labels[i]].mean(dim=0) for i in range(len(features))])
    covariance = sum(torch.outer(row, row) for row in within) / (300 - 3)
    torch.testing.assert_close(statistics.covariance, covariance)
    likelihoods = [
        torch.distributions.MultivariateNormal(features[labels == k].mean(dim=0), covariance).log_prob(features)
        for k in range(3)
    ]
    predicted = statistics.predict(features.float())
    assert torch.equal(predicted, torch.stack(likelihoods).argmax(dim=0))
    assert (predicted == labels).double().mean() > 0.7


def test_survives_its_file(samples: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    statistics = ClassStatistics.from_features(*samples)
    statistics.save(tmp_path / CLASSES_FILE)
    loaded = ClassStatistics.load(tmp_path / CLASSES_FILE)
    assert torch.equal(loaded.means, statistics.means)
    assert torch.equal(loaded.covariance, statistics.covariance)


def test_bad_file(samples: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected class statistics"):
        ClassStatistics.load(tmp_path / CLASSES_FILE)
    whole = ClassStatistics.from_features(*samples)
    ClassStatistics(whole.means, whole.covariance[:2]).save(tmp_path / CLASSES_FILE)
    with pytest.raises(UserError, match="expected means"):
        ClassStatistics.load(tmp_path / CLASSES_FILE)


def test_the_shipped_statistics_fit_the_reference() -> None:
    """Training and test images have the same distribution, and the classes equal shares: law of total covariance."""
    classes, reference = (
        ClassStatistics.load(SHIPPED / CLASSES_FILE),
        ReferenceStatistics.load(SHIPPED / REFERENCE_FILE),
    )
    mean = classes.means.mean(dim=0)
    deviation = reference.covariance.diagonal().sqrt()
    assert ((mean - reference.mean).abs() < 0.1 * deviation).all()
    total = classes.covariance + torch.cov(classes.means.T, correction=0)
    assert (total - reference.covariance).norm() < 0.1 * reference.covariance.norm()
    assert torch.equal(classes.predict(classes.means), torch.arange(10))
