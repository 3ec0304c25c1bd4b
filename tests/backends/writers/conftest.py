"""Frozen denoisers with weights in given formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, FluxTransformer2DModel

from tcaq_lightning.artifact.directory import freeze, save_artifact
from tcaq_lightning.config import ActivationConfig, LayerRule, QuantizationConfig, WeightConfig
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tests.tiny_models import tiny_unet


def tiny_flux() -> FluxTransformer2DModel:
    """A Flux whose layers have whole blocks of inputs, but for those of the noisy sample."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 8),
    ).eval()


@torch.no_grad()
def weight_only(denoiser: Any, bits: int, name: str, **weight: Any) -> Any:
    """Frozen with weights to nearest and corrected biases, and every other rule of `weight` there is."""
    rules: list[LayerRule] = weight.pop("rules", [])
    activation = ActivationConfig(weight.pop("activation_bits", 16), timestep_groups=1)
    config = QuantizationConfig(WeightConfig(bits, format=name, **weight), activation, rules=rules)
    quantize(denoiser, config, TimestepGroups([]))
    generator = torch.Generator().manual_seed(1)
    for layer in quant_layers(denoiser).values():
        layer.search_weight()
        if layer.bias_shift is not None:
            layer.bias_shift.copy_((torch.randn(layer.bias_shift.shape, generator=generator) / 50).half())
    freeze(denoiser)
    return denoiser.requires_grad_(False)


def flux_call(denoiser: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    ids = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(2), torch.arange(3), indexing="ij"), -1).view(6, 3)
    with torch.no_grad():
        found: torch.Tensor = denoiser(
            hidden_states=noise(2, 6, 4),
            encoder_hidden_states=noise(2, 5, 64),
            pooled_projections=noise(2, 64),
            timestep=torch.tensor([0.3, 0.8], dtype=dtype),
            img_ids=ids.to(dtype),
            txt_ids=torch.zeros(5, 3, dtype=dtype),
            return_dict=False,
        )[0]
    return found


@pytest.fixture
def artifact_of(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny UNet with weights alone quantized: (bits, format, further settings of the weights)."""

    def make(bits: int, name: str, **weight: Any) -> Path:
        path = tmp_path / f"artifact-{name}"
        denoiser = weight_only(tiny_unet(), bits, name, **weight)
        save_artifact(DDIMPipeline(denoiser, DDIMScheduler(num_train_timesteps=100)), "unet", denoiser, path, {})
        return path

    return make
