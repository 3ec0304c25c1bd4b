from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from PIL import Image

from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.features import REFERENCE_FILE, FeatureExtractor, save_feature_extractor
from tcaq_lightning.evaluation.recognition import CLASSES_FILE, ClassStatistics
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics
from tcaq_lightning.models.class_conditional import ClassConditionalTransformerPipeline
from tcaq_lightning.models.pipelines import initial_noise, open_pipeline
from tcaq_lightning.zoo.pretraining.denoiser import export
from tcaq_lightning.zoo.pretraining.score import main, tile
from tests.tiny_models import without_attention


def test_one_line_a_sampler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(without_attention(8), DDIMScheduler(num_train_timesteps=1000), tmp_path / "model")
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


def test_class_conditional_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes in turn, one line for each guidance scale, the samples those of the pipeline itself."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=2,
        num_layers=1,
        sample_size=4,
        patch_size=1,
        num_embeds_ada_norm=3,
    )
    vae = AutoencoderKL(
        1,
        1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=2,
        norm_num_groups=4,
    )
    model = tmp_path / "model"
    ClassConditionalTransformerPipeline(vae, transformer, DDIMScheduler(clip_sample=False)).save_pretrained(model)
    extractor = FeatureExtractor((8, 8, 8), num_features=8)
    save_feature_extractor(extractor, tmp_path / "features", {})
    real, labels = extractor(torch.rand(60, 1, 8, 8)).detach(), torch.arange(60) % 3
    ReferenceStatistics.from_features(real).save(tmp_path / "features" / REFERENCE_FILE)
    classes = ClassStatistics.from_features(real, labels)
    classes.save(tmp_path / "features" / CLASSES_FILE)
    options = {"num_images": 30, "steps": [2], "features": tmp_path / "features", "batch_size": 20}
    main(str(model), guidance_scale=[1.0, 3.0], grid=tmp_path / "grid.png", **options)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["guidance_scale"], line["clip_sample"]) for line in lines] == [(1.0, False), (3.0, False)]
    assert lines[0]["fid"] != lines[1]["fid"]
    assert Image.open(tmp_path / "grid.png").size == (3 * 8, 10 * 8)

    pipeline = open_pipeline(str(model))
    noise, _ = initial_noise((2, 4, 4), range(30), seed=0)
    asked = [i % 3 for i in range(30)]
    pipeline.scheduler = DDIMScheduler(clip_sample=False)
    images = pipeline(asked, 2, guidance_scale=3.0, latents=noise, output_type="pt").images
    with torch.no_grad():
        predicted = classes.predict(extractor(2 * images - 1))
    assert lines[1]["recognised"] == pytest.approx(float((predicted == torch.tensor(asked)).double().mean()), abs=1e-3)


def test_guidance_needs_classes() -> None:
    with pytest.raises(UserError, match="guidance_scale: a DDIMPipeline is unconditional"):
        main("fashion-mnist-ddpm", guidance_scale=[2.0])


def test_tile_order() -> None:
    images = torch.arange(6).reshape(6, 1, 1, 1).expand(6, 1, 2, 2) / 255
    grid = tile(images, columns=3)
    assert [grid.getpixel((2 * (i % 3), 2 * (i // 3))) for i in range(6)] == list(range(6))
