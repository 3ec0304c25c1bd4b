"""The models that come with the package: they open, fit their promises, and draw what they are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel

from tcaq_lightning.config import ConditioningConfig, SamplerConfig
from tcaq_lightning.evaluation.features import SHIPPED, extract_features, load_feature_extractor
from tcaq_lightning.evaluation.recognition import CLASSES_FILE, ClassStatistics
from tcaq_lightning.models.pipelines import ASSETS, open_pipeline
from tcaq_lightning.models.sampling import make_sampling
from tcaq_lightning.zoo.pretraining.latent import CLASSES, SCHEDULE

VAE = "vae/diffusion_pytorch_model.safetensors"
LATENT_MODELS = pytest.mark.parametrize(
    ("name", "denoiser"),
    [("fashion-mnist-latent", UNet2DConditionModel), ("fashion-mnist-dit", DiTTransformer2DModel)],
)


@pytest.mark.parametrize("name", ["fashion-mnist-ddpm", "fashion-mnist-latent", "fashion-mnist-dit"])
def test_a_shipped_model_takes_less_than_ten_megabytes(name: str) -> None:
    assert sum(file.stat().st_size for file in (ASSETS / name).rglob("*") if file.is_file()) < 10_000_000


def test_both_latent_models_have_the_same_autoencoder() -> None:
    assert (ASSETS / "fashion-mnist-latent" / VAE).read_bytes() == (ASSETS / "fashion-mnist-dit" / VAE).read_bytes()


@LATENT_MODELS
def test_latent_model_opens(name: str, denoiser: type[Any]) -> None:
    pipeline: Any = open_pipeline(name)
    assert isinstance(pipeline.denoiser, denoiser)
    assert tuple(pipeline.labels) == CLASSES
    assert pipeline.num_classes == 10
    assert {key: pipeline.scheduler.config[key] for key in SCHEDULE} == SCHEDULE
    for component in (pipeline.vae, pipeline.denoiser):
        values = component.state_dict().values()
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in values)
    assert 1_500_000 < pipeline.denoiser.num_parameters() < 2_000_000
    assert pipeline.vae.num_parameters() < 1_000_000


def recognise(images: torch.Tensor) -> torch.Tensor:
    """What the shipped features take images (N, 1, 28, 28) in [-1, 1] for, (N,)."""
    return ClassStatistics.load(SHIPPED / CLASSES_FILE).predict(extract_features(load_feature_extractor(), images))


@LATENT_MODELS
def test_latent_model_draws_the_class_it_is_asked_for(name: str, denoiser: type[Any]) -> None:
    pipeline: Any = open_pipeline(name)
    sampling = make_sampling(pipeline, ConditioningConfig(guidance_scale=2.0, class_labels=list(range(10))))
    images = sampling.sample(pipeline.denoiser, SamplerConfig("DDIMScheduler", 10), range(40), seed=0)
    asked = torch.arange(40) % 10
    assert images.shape == (40, 1, 28, 28)
    assert images.isfinite().all()
    assert (recognise(images) == asked).double().mean() > 0.75


@LATENT_MODELS
def test_no_class_draws_them_all(name: str, denoiser: type[Any]) -> None:
    pipeline: Any = open_pipeline(name)
    generators = [torch.Generator().manual_seed(i) for i in range(40)]
    images = pipeline([10] * 40, 10, generator=generators, output_type="pt").images
    predicted = recognise(2 * images - 1)
    assert len(predicted.unique()) >= 6
