from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.inception import WEIGHTS_NAME, load_inception, resize
from tests.evaluation.inception_weights import pictures, random_weights

# Every quarter of the features of two pictures, as torch-fidelity 0.4.0 computes them with the same weights; `spatial`
# is the output of its Mixed_6d.branch1x1, seven channels of it, channels last.
PUBLISHED = {
    "pooled": [[0.0, 0.01694105, 5.6506848, 2.4706454], [0.0, 0.04948801, 4.1389017, 1.7451038]],
    "spatial": [[0.1094283, 1.3242091, 1.7510234, 0.0], [1.2848195, 2.7786391, 1.2211792, 0.0]],
    "logits": [[6.3898754, -2.1909924, 5.7569914, -0.8141561], [4.3424797, -2.0846307, 4.2206469, -0.5658681]],
}
MEANS = {"pooled": 1.4389306, "spatial": 1.0365950, "logits": 0.1188558}


def test_agrees_with_torch_fidelity(inception_weights: Path) -> None:
    features = load_inception(inception_weights)(pictures(2, 32))
    shapes = {name: tuple(values.shape) for name, values in features._asdict().items()}
    assert shapes == {"pooled": (2, 2048), "spatial": (2, 2023), "logits": (2, 1008)}
    for name, values in features._asdict().items():
        torch.testing.assert_close(
            values[:, :: values.shape[1] // 4][:, :4], torch.tensor(PUBLISHED[name]), rtol=1e-4, atol=1e-4
        )
        assert float(values.mean()) == pytest.approx(MEANS[name], rel=1e-4)


def test_grey_stands_for_three_equal_channels(small_inception: Path) -> None:
    network, grey = load_inception(small_inception), pictures(2, channels=1)
    assert torch.equal(network(grey).pooled, network(grey.expand(-1, 3, -1, -1)).pooled)
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), size=st.integers(1, 12))
def test_resizes_as_tensorflow_1(height: int, width: int, size: int) -> None:
    x = torch.rand(1, 1, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(height * width))
    expected = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            y, z = i * np.float32(height / size), j * np.float32(width / size)
            top, left = math.floor(y), math.floor(z)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            rows = [(1 - (z - left)) * x[0, 0, r, left] + (z - left) * x[0, 0, r, right] for r in (top, bottom)]
            expected[i, j] = (1 - (y - top)) * rows[0] + (y - top) * rows[1]
    np.testing.assert_allclose(resize(x, size)[0, 0].numpy(), expected, atol=1e-5)


def test_safetensors_are_read_too(tmp_path: Path) -> None:
    save_file({k: v for k, v in random_weights().items() if "tracked" not in k}, tmp_path / "w.safetensors")
    assert load_inception(tmp_path / "w.safetensors").fc.weight.shape == (1008, 2048)


def test_missing_weights_are_named_and_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"github\.com.*inception") as caught:
        load_inception()
    assert str(tmp_path / "hub" / "checkpoints" / WEIGHTS_NAME) in str(caught.value)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(random_weights(), tmp_path / "hub" / "checkpoints" / WEIGHTS_NAME)
    assert load_inception().num_features == 2048
    with pytest.raises(UserError, match="/no/such"):
        load_inception(Path("/no/such/weights.pth"))


@pytest.mark.parametrize("content", ["empty", "pickle", "others", "list"])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if content == "empty":
        path.write_bytes(b"")
    elif content == "pickle":
        torch.save({"fc.weight": pytest.approx(1.0)}, path)  # a class that is not allowed
    else:
        torch.save([1] if content == "list" else {"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"inception_weights.*weights\.pth") as caught:
        load_inception(path)
    assert "\n" not in str(caught.value)
