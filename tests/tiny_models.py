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


def seven_units() -> UNet2DModel:
    """One level with a single attention, in grey on 8 x 8 pixels; torch's generator stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16,),
            layers_per_block=1,
            down_block_types=("AttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
            norm_num_groups=4,
            attention_head_dim=8,
        )


def without_attention(size: int) -> UNet2DModel:
    """Two levels of residual blocks, on grey images of `size` x `size` pixels."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
