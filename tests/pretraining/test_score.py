from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

from tcaq_lightning.evaluation.features import REFERENCE_FILE, FeatureExtractor, save_feature_extractor
from tcaq_lightning.evaluation.fid import ReferenceStatistics
from tcaq_lightning.pretraining.denoiser import export
from tcaq_lightning.pretraining.score import main, tile


def test_one_line_a_sampler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    export(network, DDIMScheduler(num_train_timesteps=1000), tmp_path / "model")
    extractor = FeatureExtractor((8, 8, 8), num_features=8)
    save_feature_extractor(extractor, tmp_path / "features", {})
    real = extractor(torch.rand(64, 1, 8, 8)).detach()
    ReferenceStatistics.from_features(real).save(tmp_path / "features" / REFERENCE_FILE)
    main(
        str(tmp_path / "model"),
        num_images=70,
        steps=[1, 2],
        features=tmp_path / "features",
        batch_size=40,
        grid=tmp_path / "grid.png",
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["steps"], line["clip_sample"]) for line in lines] == [(1, True), (1, False), (2, True), (2, False)]
    assert all(line["low"] <= line["fid"] <= line["high"] for line in lines)
    assert Image.open(tmp_path / "grid.png").size == (64, 64)


def test_tile_order() -> None:
    images = torch.arange(6).reshape(6, 1, 1, 1).expand(6, 1, 2, 2) / 255
    grid = tile(images, columns=3)
    assert [grid.getpixel((2 * (i % 3), 2 * (i // 3))) for i in range(6)] == list(range(6))
