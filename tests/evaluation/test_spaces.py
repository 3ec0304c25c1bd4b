from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tcaq_lightning.config import EvaluationConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.evaluate import evaluate_images
from tcaq_lightning.evaluation.features import load_feature_extractor
from tcaq_lightning.evaluation.images import ImageFolder, ImageWriter, open_images
from tcaq_lightning.evaluation.inception import Inception, load_inception
from tcaq_lightning.evaluation.metrics.fid import frechet_distance
from tcaq_lightning.evaluation.reference import open_reference
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics
from tcaq_lightning.evaluation.spaces import FeatureSpace, measure_images, open_space, write_statistics
from tests.evaluation.inception_weights import pictures
from tests.evaluation.parts import parts

NAMES = ("pooled", "spatial", "logits")


def folder(path: Path, count: int, **kwargs: Any) -> Path:
    ImageWriter(path, "test").write(range(count), pictures(count, **kwargs))
    return path


def config(weights: Path | None = None, **changes: Any) -> EvaluationConfig:
    values: dict[str, Any] = {"features": "inception", "inception_weights": weights and str(weights), "batch_size": 3}
    values |= {"is_splits": 2, "kid_subsets": 2, "kid_subset_size": 4, "neighbours": 2}
    return EvaluationConfig(**{**values, **changes})


def test_samples_are_measured_as_the_pictures_they_become(small_inception: Path) -> None:
    space = FeatureSpace(load_inception(small_inception), NAMES)
    pixels = pictures(4)
    of_pixels = space.of_pixels(pixels, 0)
    assert list(of_pixels) == list(NAMES)
    of_samples = space.of_samples(pixels.float() / 127.5 - 1, 0)
    assert all(torch.equal(of_samples[name], of_pixels[name]) for name in NAMES)
    direct = load_inception(small_inception)(pixels)
    torch.testing.assert_close(of_pixels["pooled"], direct.pooled)
    torch.testing.assert_close(of_pixels["logits"], direct.logits)


def test_diverged_samples_are_marked(small_inception: Path) -> None:
    space = FeatureSpace(load_inception(small_inception), ("pooled",))
    samples = torch.zeros(3, 1, 8, 8)
    samples[1, 0, 2, 2] = torch.nan
    features = space.of_samples(samples, 0)["pooled"]
    assert features.isfinite().all(dim=1).tolist() == [True, False, True]


def test_own_extractor_sees_pictures_in_its_own_range(features_dir: Path) -> None:
    extractor = load_feature_extractor(features_dir)
    pixels = pictures(4, channels=1)
    found = FeatureSpace(extractor, ("pooled",)).of_pixels(pixels, 0)
    torch.testing.assert_close(found["pooled"], extractor(pixels.float() / 127.5 - 1))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Numbers of the images that were read, by batch."""
    calls: list[list[int]] = []
    original = ImageFolder.read

    def spy(self: ImageFolder, indices: Any) -> Any:
        calls.append(list(indices))
        return original(self, indices)

    monkeypatch.setattr(ImageFolder, "read", spy)
    return calls


class KilledError(Exception):
    """Stands for a signal."""


def test_killed_measurement_goes_on(small_inception: Path, tmp_path: Path, read: list[list[int]]) -> None:
    images = open_images(folder(tmp_path / "images", 8), "images")
    space = FeatureSpace(load_inception(small_inception), NAMES)
    expected = measure_images(images, space, 8, 3)
    assert read == [[0, 1, 2], [3, 4, 5], [6, 7]]
    read.clear()
    counts: list[int] = []

    def kill(count: int) -> None:
        counts.append(count)
        if len(counts) == 2:
            raise KilledError

    with pytest.raises(KilledError):
        measure_images(images, space, 8, 3, tmp_path / "cache", kill)
    resumed = measure_images(images, space, 8, 3, tmp_path / "cache", counts.append)
    assert read == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert counts == [3, 3, 3, 3, 2]
    assert all(torch.equal(resumed[name], expected[name]) for name in NAMES)
    measure_images(images, space, 8, 3, tmp_path / "cache")
    assert len(read) == 3
    Image.fromarray(pictures(1, seed=7)[0].permute(1, 2, 0).numpy()).save(tmp_path / "images" / "000001.png")
    measure_images(images, space, 8, 3, tmp_path / "cache")
    assert len(read) == 6


def test_whole_evaluation_of_images(small_inception: Path, tmp_path: Path) -> None:
    """Every metric from a folder against a folder, an array and saved statistics: the same figures."""
    fake, real = folder(tmp_path / "fake", 7), folder(tmp_path / "real", 9, seed=1)
    np.savez(tmp_path / "real.npz", pictures(9, seed=1).permute(0, 2, 3, 1).numpy())
    settings = config(small_inception, metrics=["fid", "sfid", "is", "kid", "precision_recall"])
    write_statistics(open_images(real, "images"), tmp_path / "real.safetensors", settings, 100)
    results = []
    for reference in ("real", "real.npz", "real.safetensors"):
        settings.reference = str(tmp_path / reference)
        counts: list[int] = []
        metrics = evaluate_images(open_images(fake, "path"), settings, 0, advance=counts.append)
        assert sum(counts) == 7
        results.append(metrics.to_dict())
        results[-1].pop("seconds")
        results[-1]["protocol"].pop("reference")
    assert results[0] == results[1] == results[2]

    network = load_inception(small_inception)
    a, b = network(pictures(7)), network(pictures(9, seed=1))
    expected = frechet_distance(a.pooled, ReferenceStatistics.from_features(b.pooled), allow_few=True)
    assert results[0]["scores"]["images"]["fid"]["value"] == pytest.approx(expected.value, rel=1e-5)
    expected = frechet_distance(a.spatial, ReferenceStatistics.from_features(b.spatial), allow_few=True)
    assert results[0]["scores"]["images"]["sfid"]["value"] == pytest.approx(expected.value, rel=1e-4)
    assert set(results[0]["scores"]) == {"images"}
    assert list(results[0]["scores"]["images"]) == ["fid", "sfid", "is", "kid", "precision_recall"]


def test_same_images_are_at_no_distance(small_inception: Path, tmp_path: Path) -> None:
    fake = folder(tmp_path / "fake", 6)
    settings = config(small_inception, metrics=["fid", "precision_recall"], reference=str(fake))
    metrics = evaluate_images(open_images(fake, "path"), settings, 0, tmp_path / "cache")
    assert metrics.scores["images"]["fid"]["value"] == pytest.approx(0, abs=1e-2)
    assert metrics.scores["images"]["precision_recall"]["precision"] == 1


def test_only_some_images(small_inception: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake = folder(tmp_path / "fake", 6)
    settings = config(small_inception, fid_samples=5, reference=str(fake))
    with caplog.at_level(logging.WARNING):
        metrics = evaluate_images(open_images(fake, "path"), settings, 0)
    assert metrics.scores["images"]["fid"]["num_samples"] == 5
    assert "5 samples by 2048 features" in caplog.text
    settings.fid_samples = 7
    with pytest.raises(UserError, match="at most the 6 images"):
        evaluate_images(open_images(fake, "path"), settings, 0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"metrics": ["fid"]}, "evaluation.reference must be given"),
        ({"metrics": ["is"], "is_splits": 7}, "at least 7 for is"),
        ({"metrics": ["kid"], "kid_subset_size": 7, "reference": "REAL"}, "at least 7 for kid"),
        ({"metrics": ["kid"], "kid_subset_size": 5, "reference": "FEW"}, "at least 5 for kid.*got 4"),
        ({"metrics": ["precision_recall"], "neighbours": 6, "reference": "REAL"}, "at least 7 for precision_recall"),
        ({"reference": "EMPTY"}, "got none"),
        ({"reference": "REAL", "inception_weights": "/no/weights.pth"}, "/no/weights.pth"),
        ({"metrics": ["clip"], "clip_model": "CLIP", "clip_prompts": "/no/prompts"}, "/no/prompts"),
        ({"reference": "REAL", "features": "/no/features"}, "/no/features"),
        ({"reference": "REAL", "features": "OWN"}, "expected grey images"),
    ],
)
def test_mistakes_show_before_anything_is_measured(
    changes: dict[str, Any],
    text: str,
    small_inception: Path,
    features_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Inception, "forward", lambda *_: pytest.fail("a picture was measured"))
    places = {name: tmp_path / name for name in ("REAL", "FEW", "EMPTY", "CLIP")} | {"OWN": features_dir}
    folder(places["REAL"], 6)
    folder(places["FEW"], 4)
    places["EMPTY"].mkdir()
    given = {k: str(places.get(v, v)) if isinstance(v, str) else v for k, v in changes.items()}
    settings = {"inception_weights": str(small_inception), **given}
    images = open_images(places["REAL"], "path")
    with pytest.raises(UserError, match=text) as caught:
        evaluate_images(images, config(**settings), 0)
    assert "\n" not in str(caught.value)


def test_images_that_an_own_extractor_does_not_take(features_dir: Path, tmp_path: Path) -> None:
    settings = EvaluationConfig(features=str(features_dir))
    with pytest.raises(UserError, match="3 channels"):
        evaluate_images(open_images(folder(tmp_path / "rgb", 6), "path"), settings, 0)
    with pytest.raises(UserError, match="more than the 4 features"):
        evaluate_images(open_images(folder(tmp_path / "few", 4, channels=1), "path"), settings, 0)
    metrics = evaluate_images(open_images(folder(tmp_path / "grey", 8, channels=1), "path"), settings, 0)
    distance = metrics.scores["images"]["fid"]
    assert distance["low"] < distance["value"] < distance["high"]


def test_statistics_know_their_extractor(small_inception: Path, features_dir: Path, tmp_path: Path) -> None:
    grey = open_images(folder(tmp_path / "grey", 6, channels=1), "images")
    output = tmp_path / "out" / "s.safetensors"
    write_statistics(grey, output, config(small_inception), 2)
    checksum = open_space(config(small_inception, metrics=["is"])).checksum
    found = open_reference(output, parts("fid", "sfid", "kid"), 2048, checksum)
    assert found.spatial is not None
    assert found.features is not None
    assert len(found.features) == 2
    with pytest.raises(UserError, match="checksum"):
        open_space(EvaluationConfig(features=str(features_dir), reference=str(output)))
    write_statistics(grey, output, EvaluationConfig(features=str(features_dir)), 2)
    assert open_reference(output, parts("fid"), 4, open_space(EvaluationConfig(features=str(features_dir))).checksum)
    with pytest.raises(UserError, match="at least 2"):
        write_statistics(open_images(folder(tmp_path / "one", 1), "images"), output, config(small_inception), 2)
