"""A UNet whose attentions have a fixed number of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from diffusers.models.attention_processor import Attention

from tcaq_lightning.artifact.directory import freeze, save_artifact
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.config import QuantizationConfig, WeightConfig
from tcaq_lightning.models.pipelines import find_denoiser, open_pipeline
from tcaq_lightning.models.unets import FixedHeadsUNet2DModel
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups

SETTINGS: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def test_every_attention_has_the_heads() -> None:
    unet = FixedHeadsUNet2DModel(**SETTINGS, num_attention_heads=4)
    attentions = [m for m in unet.modules() if isinstance(m, Attention)]
    assert {(m.inner_dim, m.heads, m.scale) for m in attentions} == {(8, 4, 2**-0.5), (16, 4, 0.5)}


def test_is_the_parent_where_that_can_say_the_same() -> None:
    same = {**SETTINGS, "block_out_channels": (8, 8)}
    ours, parent = FixedHeadsUNet2DModel(**same, num_attention_heads=4), UNet2DModel(**same, attention_head_dim=2)
    parent.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(ours(x, 5).sample, parent(x, 5).sample)


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match=r"num_attention_heads must divide the channels of .*, 8, got 3"):
        FixedHeadsUNet2DModel(**SETTINGS, num_attention_heads=3)


def test_its_artifact_opens(tmp_path: Path) -> None:
    unet: Any = FixedHeadsUNet2DModel(**SETTINGS, num_attention_heads=4).requires_grad_(False).eval()
    pipeline = DDPMPipeline(unet, DDIMScheduler())
    quantize(unet, QuantizationConfig(weight=WeightConfig(bits=8)), TimestepGroups([500.0]))
    for quantizer in quantizers(unet).values():
        quantizer.delta.fill_(0.05)
        if hasattr(quantizer, "zero_point"):
            quantizer.zero_point.fill_(128)
    for layer in quant_layers(unet).values():
        layer.learned_weight.search(layer.input_quantizer.r)
    freeze(unet)
    save_artifact(pipeline, "unet", unet, str(tmp_path / "quantized"), {})
    _, opened = find_denoiser(load_quantized(str(tmp_path / "quantized")))
    assert isinstance(opened, FixedHeadsUNet2DModel)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(opened(x, 5).sample, unet(x, 5).sample)


def test_opens_from_its_files(tmp_path: Path) -> None:
    unet = FixedHeadsUNet2DModel(**SETTINGS, num_attention_heads=4).eval()
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    _, opened = find_denoiser(open_pipeline(str(tmp_path)))
    assert isinstance(opened, FixedHeadsUNet2DModel)
    torch.testing.assert_close(opened.state_dict(), unet.state_dict(), rtol=0, atol=0)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(opened(x, 5).sample, unet(x, 5).sample)  # bits depend on where in memory weights begin
