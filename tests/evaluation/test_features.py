from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.features import (
    REFERENCE_FILE,
    SHIPPED,
    FeatureExtractor,
    extract_features,
    load_feature_extractor,
    save_feature_extractor,
)
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_round_trip(tmp_path: Path) -> None:
    extractor = FeatureExtractor((8, 8, 16), num_features=12, num_groups=4)
    save_feature_extractor(extractor, tmp_path, {"test_accuracy": 0.5})
    loaded = load_feature_extractor(tmp_path)
    assert loaded.num_features == 12
    assert torch.equal(loaded(images(3)), extractor(images(3)))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert json.loads((tmp_path / "config.json").read_text())["test_accuracy"] == 0.5


def test_clamps_and_ignores_mode_and_batch() -> None:
    extractor = FeatureExtractor()
    x = images(4)
    features = extractor.train()(x)
    torch.testing.assert_close(extractor.eval()(x), features)
    torch.testing.assert_close(extractor(x * 5), extractor((x * 5).clamp(-1, 1)))
    torch.testing.assert_close(extract_features(extractor, x, batch_size=3), features)


def test_missing_and_mismatched_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pretraining\.classifier"):
        load_feature_extractor(tmp_path)
    save_feature_extractor(FeatureExtractor((8, 8, 8)), tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    config["architecture"]["num_features"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="size mismatch") as caught:
        load_feature_extractor(tmp_path)
    assert "\n" not in str(caught.value)


def test_shipped_extractor_fits_its_reference() -> None:
    extractor = load_feature_extractor()
    reference = ReferenceStatistics.load(SHIPPED / REFERENCE_FILE)
    assert reference.count == 10_000
    assert reference.mean.dtype == torch.float64
    assert reference.mean.shape == (extractor.num_features,)
    assert torch.linalg.eigvalsh(reference.covariance).min() > 0
    assert json.loads((SHIPPED / "config.json").read_text())["test_accuracy"] > 0.91
