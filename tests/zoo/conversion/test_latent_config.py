"""YAML files of latent diffusion: what diffusers' configs they become, and what has no counterpart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tcaq_lightning.errors import UserError
from tcaq_lightning.zoo.conversion import latent_config
from tests.zoo.conversion.published import BEDROOMS, CHURCHES, FIRST, IMAGENET, STABLE_DIFFUSION, UNET, changed

PARAMS = "model__params__"


def test_the_noise_schedule_and_the_samplers_last_step() -> None:
    scheduler = latent_config.architecture(CHURCHES)["scheduler"].build_scheduler()
    betas = torch.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), alphas, rtol=1e-4, atol=0)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    assert scheduler.config.prediction_type == "epsilon"
    other = {PARAMS + "beta_schedule": "sqrt_linear", PARAMS + "parameterization": "x0"}
    scheduler = latent_config.architecture(changed(CHURCHES, **other))["scheduler"].build_scheduler()
    torch.testing.assert_close(scheduler.betas.double(), torch.linspace(0.0015, 0.0155, 1000, dtype=torch.float64))
    assert scheduler.config.prediction_type == "sample"


def test_factors_of_the_latents() -> None:
    assert latent_config.architecture(BEDROOMS)["vqvae"].config["scaling_factor"] == 1
    assert latent_config.architecture(STABLE_DIFFUSION)["vae"].config["scaling_factor"] == 0.18215


def test_heads() -> None:
    """By channels a head, or by a fixed number, which diffusers' unconditional UNet does not have."""
    assert latent_config.architecture(BEDROOMS)["unet"].config["attention_head_dim"] == 32
    churches = latent_config.architecture(CHURCHES)["unet"]
    assert (churches.name, churches.config["num_attention_heads"]) == ("FixedHeadsUNet2DModel", 8)
    equal = latent_config.architecture(changed(CHURCHES, **{UNET + "channel_mult": [1, 1, 1, 1, 1]}))["unet"]
    assert (equal.name, equal.config["attention_head_dim"]) == ("UNet2DModel", 24)
    assert latent_config.architecture(IMAGENET)["unet"].config["attention_head_dim"] == 1  # diffusers: heads
    by_channels = changed(IMAGENET, **{UNET + "num_head_channels": 64})
    assert latent_config.architecture(by_channels)["unet"].config["attention_head_dim"] == [3, 6, 9, 15]


@pytest.mark.parametrize(
    ("base", "change", "pattern"),
    [
        (
            BEDROOMS,
            {PARAMS + "unet_config__target": "ldm.Other"},
            "unet_config.target must be a UNetModel, got ldm.Other",
        ),
        (BEDROOMS, {FIRST + "__target": "ldm.IdentityFirstStage"}, "VQModelInterface or AutoencoderKL"),
        (BEDROOMS, {UNET + "use_new_attention_order": True}, "use_new_attention_order must be False, got True"),
        (BEDROOMS, {UNET + "num_classes": 10}, "num_classes must be None, got 10"),
        (BEDROOMS, {UNET + "odd": 1}, "odd is not known"),
        (BEDROOMS, {UNET + "num_head_channels": None}, "needs num_heads or num_head_channels, got neither"),
        (BEDROOMS, {UNET + "num_head_channels": 100}, "must divide the attentions' channels"),
        (BEDROOMS, {UNET + "model_channels": None}, "model_channels is missing"),
        (BEDROOMS, {UNET + "use_spatial_transformer": True}, "unconditional model"),
        (
            BEDROOMS,
            {PARAMS + "beta_schedule": "cosine"},
            "beta_schedule must be one of linear, sqrt_linear, got 'cosine'",
        ),
        (BEDROOMS, {PARAMS + "parameterization": "z"}, "parameterization must be one of eps, x0, v, got 'z'"),
        (BEDROOMS, {FIRST + "__params__ddconfig__attn_type": "linear"}, "attn_type must be 'vanilla', got 'linear'"),
        (BEDROOMS, {FIRST + "__params__ddconfig__double_z": True}, "double_z must be False, got True"),
        (CHURCHES, {FIRST + "__params__embed_dim": 3}, "embed_dim must be z_channels, 4, got 3"),
        (IMAGENET, {UNET + "use_spatial_transformer": False}, "use_spatial_transformer must be true"),
        (IMAGENET, {UNET + "resblock_updown": True}, "resblock_updown must be False, got True"),
        (IMAGENET, {PARAMS + "cond_stage_config__target": "ldm.BERTEmbedder"}, "ClassEmbedder or FrozenCLIPEmbedder"),
        (IMAGENET, {PARAMS + "cond_stage_config__params__n_classes": None}, "n_classes is missing"),
        (IMAGENET, {"model": {"target": "x"}}, "model.params is missing"),
    ],
)
def test_settings_without_a_counterpart_are_named(base: dict[str, Any], change: dict[str, Any], pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        latent_config.architecture(changed(base, **change))
    assert "\n" not in str(caught.value)
