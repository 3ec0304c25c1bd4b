from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.features import FeatureExtractor
from tcaq_lightning.zoo.pretraining import autoencoder
from tcaq_lightning.zoo.pretraining.autoencoder import (
    AutoencoderPretraining,
    AutoencoderRecipe,
    encode,
    kl_divergence,
    load_autoencoder,
    main,
    new_autoencoder,
    perceptual_distance,
    reconstruct,
    scaling_factor,
)
from tcaq_lightning.zoo.pretraining.idx import read_split
from tests.zoo.pretraining.conftest import killed

WEIGHTS = "diffusion_pytorch_model.safetensors"
SETTINGS = {"steps": 4, "batch_size": 4, "warmup": 2, "save_every": 2}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4}
    monkeypatch.setattr(autoencoder, "ARCHITECTURE", autoencoder.ARCHITECTURE | narrow)


def test_kl_divergence_agrees_with_torch_distributions() -> None:
    mean, log_variance = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected)


def test_perceptual_distance_is_that_of_normalised_feature_maps() -> None:
    torch.manual_seed(0)
    extractor = FeatureExtractor((8, 8, 8), num_features=4)
    maps: list[torch.Tensor] = []
    for layer in extractor.body:
        if isinstance(layer, torch.nn.ReLU):
            layer.register_forward_hook(lambda _module, _args, output: maps.append(output))
    a, b = torch.rand(3, 1, 28, 28), torch.rand(3, 1, 28, 28)
    extractor(a)
    extractor(b)
    assert len(maps) == 10
    unit = [x / x.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-3) for x in maps]
    expected = sum(((p - q) ** 2).sum() / p[:, 0].numel() for p, q in zip(unit[:5], unit[5:], strict=True))
    torch.testing.assert_close(perceptual_distance(extractor, a, b), expected)
    assert perceptual_distance(extractor, a, a) == 0


def test_scaled_samples_of_the_latents_have_unit_variance(data: Path) -> None:
    images, _ = read_split(data, "train")
    mean, deviation = encode(new_autoencoder(seed=0), images, batch_size=40)
    assert mean.shape == deviation.shape == (96, 4, 7, 7)
    samples = mean + deviation * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    assert float((samples * scaling_factor(mean, deviation)).std()) == pytest.approx(1, rel=0.02)


def test_learns(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = read_split(data, "train")
    recipe = AutoencoderRecipe(steps=30, batch_size=16, lr=3e-3)
    module = AutoencoderPretraining(new_autoencoder(seed=0), FeatureExtractor((8, 8, 8)), images, recipe)
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.append({k: float(v) for k, v in values.items()}))
    optimizer = torch.optim.AdamW(module.network.parameters(), lr=3e-3)
    for i in range(30):
        optimizer.zero_grad()
        module.training_step(i, i).backward()
        optimizer.step()
    for name in ("loss", "l1"):
        assert sum(line[name] for line in logged[-5:]) < 0.7 * sum(line[name] for line in logged[:5])
    line = logged[0]
    total = line["l1"] + recipe.perceptual_weight * line["perceptual"] + recipe.kl_weight * line["kl"]
    assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_resumed_run_equals_uninterrupted_run_and_is_scored(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(data, tmp_path / "whole", **SETTINGS)
    line = json.loads(capsys.readouterr().out)
    assert line["images"] == 80
    assert line["fid"] > 0
    with killed(AutoencoderPretraining, 3):
        main(data, tmp_path / "parts", **SETTINGS)
    half = load_file(tmp_path / "parts" / "model" / WEIGHTS)
    main(data, tmp_path / "parts", **SETTINGS)
    expected, resumed = (load_file(tmp_path / run / "model" / WEIGHTS) for run in ("whole", "parts"))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(resumed[key], value) for key, value in expected.items())
    assert any(not torch.equal(half[key], value) for key, value in expected.items())

    opened = load_autoencoder(tmp_path / "whole" / "model")
    images, _ = read_split(data, "train")
    assert opened.config.scaling_factor == scaling_factor(*encode(opened, images))
    test_images, _ = read_split(data, "test")
    mse = F.mse_loss(reconstruct(opened, test_images), test_images[:, None] / 127.5 - 1)
    assert line["mse"] == pytest.approx(float(mse), abs=1e-5)


def test_no_autoencoder_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected an AutoencoderKL in") as caught:
        load_autoencoder(tmp_path)
    assert "\n" not in str(caught.value)
