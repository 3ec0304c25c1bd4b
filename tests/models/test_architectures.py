"""Models without weights: shapes on the meta device, and the plan that --dry_run makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from tcaq_lightning.calibration.planning.sketch import sketch_run
from tcaq_lightning.config import Config, ModelConfig, QuantizationConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.models import architectures
from tcaq_lightning.models.architectures import example_samples, find_architecture, meta_denoiser

SMALL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
AXES = (2, 2, 4)


def conditional(**changes: Any) -> UNet2DConditionModel:
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**SMALL_UNET, **blocks, cross_attention_dim=12, **changes)


def build(name: str) -> Any:
    if name == "unet":
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        return UNet2DModel(**SMALL_UNET, **blocks, num_class_embeds=3)
    if name == "text":
        return conditional()
    if name == "text_time":
        sizes = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 4 * 6 + 10}
        return conditional(addition_embed_type="text_time", **sizes)
    if name == "dit":
        return DiTTransformer2DModel(**HEADS, in_channels=4, sample_size=8, num_embeds_ada_norm=5)
    if name == "pixart":
        return PixArtTransformer2DModel(
            **HEADS, in_channels=4, out_channels=8, sample_size=8, cross_attention_dim=16, caption_channels=12
        )
    if name == "sd3":
        sizes = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
        return SD3Transformer2DModel(**HEADS, sample_size=8, in_channels=4, out_channels=4, **sizes)
    sizes = {"joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": AXES}
    return FluxTransformer2DModel(**HEADS, num_single_layers=1, in_channels=4, guidance_embeds=True, **sizes)


FAMILIES = ["unet", "text", "text_time", "dit", "pixart", "sd3", "flux"]


@pytest.mark.parametrize("family", FAMILIES)
def test_example_samples_are_what_the_denoiser_takes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "FLUX_SIDE", 2)
    denoiser = build(family).eval()
    with torch.no_grad():
        real = example_samples(denoiser, 3).predict(denoiser)
    assert real.shape[0] == 3
    meta = architectures.on_meta({"_class_name": type(denoiser).__name__, **denoiser.config})
    with torch.no_grad():
        assert example_samples(meta, 3).predict(meta).shape == real.shape
    assert all(p.is_meta for p in meta.parameters())


@pytest.fixture
def architecture(tmp_path: Path) -> Path:
    conditional().save_config(tmp_path / "model" / "unet")
    DDIMScheduler(clip_sample=False).save_config(tmp_path / "model" / "scheduler")
    (tmp_path / "model" / "model_index.json").write_text("{}")
    return tmp_path / "model"


def test_a_plan_without_weights(architecture: Path) -> None:
    config = Config(model=ModelConfig("nowhere", str(architecture)), quantization=QuantizationConfig())
    config.conditioning.guidance_scale = 3.0
    sketch = sketch_run(config)
    samples = config.calibration.num_trajectories + config.calibration.held_out_trajectories
    assert sketch.plan.samples == 2 * 20 * samples  # both rows of a guided sample
    parameters = sum(p.numel() for p in meta_denoiser(architecture).parameters())
    assert f"{parameters / 1e6:,.1f} million parameters" in str(sketch)
    assert "W4 A8" in sketch.plan.layers
    assert "W4 A8" in {row.bits for row in sketch.coverage}
    assert "TFLOP/s, which is assumed" in str(sketch)


def test_no_such_architecture(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.architecture: no configuration called 'nothing'"):
        find_architecture("nothing")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no config\.json of a unet or transformer"):
        meta_denoiser(find_architecture(str(tmp_path)))
