"""Pipelines of toy size that no text conditions."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from tcaq_lightning.models.class_conditional import ClassConditionalLatentPipeline, ClassEmbedder


def autoencoder(channels: int, latent_channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        channels,
        channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=latent_channels,
        norm_num_groups=4,
        scaling_factor=0.5,
    )


def latent_unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **changes,
    )


def pixel_unet(channels: int = 1, **changes: Any) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **changes,
    )


def class_conditional() -> Any:
    embedder = ClassEmbedder(num_classes=5, embedding_dim=12)
    return ClassConditionalLatentPipeline(autoencoder(1, 3), latent_unet(), DDIMScheduler(clip_sample=False), embedder)


def dit() -> Any:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer, autoencoder(3, 4), DDIMScheduler(clip_sample=False))


def consistency() -> Any:
    return ConsistencyModelPipeline(pixel_unet(num_class_embeds=7), CMStochasticIterativeScheduler())


PIPELINES = {"class": class_conditional, "dit": dit, "consistency": consistency}


def make_pipeline(name: str) -> Any:
    """One of `PIPELINES`, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return pipeline
