from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.reference import Reference, open_reference
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics
from tests.evaluation.inception_weights import pictures
from tests.evaluation.parts import parts


def features(n: int = 30, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def adm(path: Path, *names: str, **changes: Any) -> Path:
    """An .npz as guided-diffusion has them."""
    mean, covariance = np.arange(6.0), np.eye(6, dtype=np.float32)
    arrays = {
        "arr_0": pictures(4).permute(0, 2, 3, 1).numpy(),
        "mu": mean,
        "sigma": covariance,
        "mu_s": np.arange(4.0),
        "sigma_s": 2 * np.eye(4),
    } | changes
    np.savez(path, **{name: arrays[name] for name in names})
    return path


def test_saved_statistics_come_back(tmp_path: Path) -> None:
    measured = {"pooled": features(), "spatial": features(width=9, seed=1)}
    whole = Reference().completed(measured)
    whole.save(tmp_path / "r.safetensors", 10, "inception", "abc")
    found = open_reference(tmp_path / "r.safetensors", parts("fid", "sfid", "kid"), 6, "abc")
    assert torch.equal(found.statistics.mean, whole.statistics.mean)  # type: ignore[union-attr]
    assert torch.equal(found.statistics.covariance, whole.statistics.covariance)  # type: ignore[union-attr]
    assert torch.equal(found.spatial.covariance, whole.spatial.covariance)  # type: ignore[union-attr]
    assert found.statistics.count == 30  # type: ignore[union-attr]
    assert torch.equal(found.features, measured["pooled"][::3])  # type: ignore[arg-type]
    np.testing.assert_allclose(
        whole.statistics.covariance.numpy(),  # type: ignore[union-attr]
        np.cov(measured["pooled"].double().numpy(), rowvar=False),
        rtol=1e-9,
        atol=1e-9,
    )
    whole.save(tmp_path / "few.safetensors", 0, "inception", "abc")
    assert "features" not in load_file(tmp_path / "few.safetensors")
    whole.save(tmp_path / "all.safetensors", 99, "inception", "abc")
    assert len(load_file(tmp_path / "all.safetensors")["features"]) == 30


def test_statistics_of_an_own_extractor_need_no_record(tmp_path: Path) -> None:
    ReferenceStatistics.from_features(features()).save(tmp_path / "r.safetensors")
    assert open_reference(tmp_path / "r.safetensors", parts("fid"), 6, "abc").missing(["statistics"]) == []


def test_npz_of_statistics(tmp_path: Path) -> None:
    found = open_reference(adm(tmp_path / "a.npz", "mu", "sigma", "mu_s", "sigma_s"), parts("fid", "sfid"), 6, "")
    assert found.missing(["statistics", "spatial"]) == []
    assert found.statistics is not None
    assert found.spatial is not None
    assert found.statistics.mean.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(found.spatial.covariance, 2 * torch.eye(4).double())
    assert found.images is None


def test_npz_of_both_keeps_its_statistics_and_measures_its_images_only_where_it_must(tmp_path: Path) -> None:
    path = adm(tmp_path / "a.npz", "arr_0", "mu", "sigma", "mu_s", "sigma_s")
    assert open_reference(path, parts("fid", "sfid"), 6, "").images is None
    found = open_reference(path, parts("fid", "kid"), 6, "")
    assert found.images is not None
    assert len(found.images) == 4
    whole = found.completed({"pooled": features(), "spatial": features(width=4)})
    assert whole.statistics is found.statistics
    assert whole.spatial is found.spatial
    assert torch.equal(whole.features, features())  # type: ignore[arg-type]


def test_images_alone(tmp_path: Path) -> None:
    found = open_reference(adm(tmp_path / "a.npz", "arr_0"), parts("fid", "precision_recall"), 6, "")
    assert found.missing(["statistics", "features"]) == ["features", "statistics"]
    assert found.images is not None


@pytest.mark.parametrize(
    ("names", "changes", "metrics", "text"),
    [
        (["mu", "sigma"], {"mu": np.zeros(5), "sigma": np.eye(5)}, ["fid"], "6 features.*got 5"),
        (["mu", "sigma"], {"sigma": np.eye(5)}, ["fid"], r"\(6,\) and \(5, 5\)"),
        (["mu", "sigma"], {}, ["fid", "sfid"], "sfid cannot be measured.*spatial statistics"),
        (["mu", "sigma"], {}, ["kid", "precision_recall"], "kid, precision_recall cannot be measured.*features"),
        (["mu_s", "sigma_s"], {}, ["fid"], "fid cannot be measured"),
        (["mu"], {}, ["fid"], r'arr_0.*\["mu"\]'),
        (["arr_0"], {"arr_0": np.zeros((4, 3))}, ["fid"], "arr_0"),
        (["mu", "sigma"], {"mu": np.array([None], dtype=object)}, ["fid"], r"a\.npz"),
    ],
)
def test_npz_that_is_not_enough(
    names: list[str], changes: dict[str, Any], metrics: list[str], text: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=text) as caught:
        open_reference(adm(tmp_path / "a.npz", *names, **changes), parts(*metrics), 6, "")
    assert "\n" not in str(caught.value)


def test_statistics_of_another_extractor_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    Reference().completed({"pooled": features()}).save(path, 5, "inception", "abc")
    for metrics, width, digest, text in (
        (["fid"], 6, "xyz", "checksum xyz.*inception with abc"),
        (["fid"], 7, "abc", "7 features.*got 6"),
        (["sfid"], 6, "abc", "sfid"),
    ):
        with pytest.raises(UserError, match=text):
            open_reference(path, parts(*metrics), width, digest)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="statistics"):
        open_reference(path, parts("fid"), 6, "abc")
    with pytest.raises(UserError, match="nowhere"):
        open_reference(tmp_path / "nowhere.safetensors", parts("fid"), 6, "abc")
    with pytest.raises(UserError, match="nowhere"):
        open_reference(tmp_path / "nowhere.npz", parts("fid"), 6, "abc")
