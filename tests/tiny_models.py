"""Denoisers that are as small as they can be with every kind of block."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel


def tiny_unet() -> UNet2DModel:
    """Two levels with attention on the lower one, on 8 x 8 pixels in grey."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()
