from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tcaq_lightning.evaluation import inception
from tcaq_lightning.evaluation.features import REFERENCE_FILE, FeatureExtractor, save_feature_extractor
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics
from tests.evaluation.inception_weights import random_weights


@pytest.fixture(scope="session")
def features_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random extractor of four features, with statistics of noise images."""
    directory = tmp_path_factory.mktemp("features")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        extractor = FeatureExtractor((4, 4, 4), num_features=4, num_groups=2)
        features = extractor(torch.rand(50, 1, 8, 8) * 2 - 1)
    save_feature_extractor(extractor, directory, {})
    ReferenceStatistics.from_features(features.detach()).save(directory / REFERENCE_FILE)
    return directory


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in the layout of torch-fidelity's."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_weights(), path)
    return path


@pytest.fixture
def small_inception(monkeypatch: pytest.MonkeyPatch, inception_weights: Path) -> Path:
    """The weights, with images resized to the least side that Inception takes: sixteen times faster."""
    monkeypatch.setattr(inception, "INPUT_SIZE", 75)
    return inception_weights
