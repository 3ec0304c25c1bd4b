"""A tiny model of each denoiser class, and what it is called with: two samples, and a third timestep now and then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

B = 2
"""Samples of a call."""


@dataclass(frozen=True)
class Example:
    """A tiny model of one class.

    Attributes:
        settings: of its constructor.
        inputs: makes the arguments of a call on two samples, beside the timestep.
        timestep: name of the timestep.
        unit: what a timestep of 1000 is called with.
    """

    settings: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    timestep: str = "timestep"
    unit: float = 1000.0

    def arguments(self) -> dict[str, Any]:
        """All arguments of a call, the same each time."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return {**self.inputs(), self.timestep: torch.tensor([0.9, 0.2]) * self.unit, "return_dict": False}


def normal(*shape: int) -> Tensor:
    """(B, ...) normal values."""
    return torch.randn(B, *shape)


def mask(tokens: int, masked: int = 2) -> Tensor:
    """(B, tokens), the second sample shorter by `masked`."""
    seen = torch.ones(B, tokens, dtype=torch.bool)
    seen[1, tokens - masked :] = False
    return seen


def ids(tokens: int, axes: int = 3) -> Tensor:
    """(tokens, axes) positions along the last axis."""
    positions = torch.zeros(tokens, axes)
    positions[:, axes - 1] = torch.arange(tokens)
    return positions


WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 1,
    "rope_max_seq_len": 16,
}
FLUX: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (2, 2, 4),
}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
COGVIDEO: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 4,
    "text_embed_dim": 10,
    "num_layers": 1,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": 6,
}
HUNYUAN: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "text_embed_dim": 10,
    "pooled_projection_dim": 6,
    "rope_axes_dim": (2, 2, 4),
}


def packed(**further: Any) -> Callable[[], dict[str, Any]]:
    """What Flux takes: packed latents and a prompt, with their positions."""
    return lambda: {
        "hidden_states": normal(9, 4),
        "encoder_hidden_states": normal(5, 12),
        "img_ids": ids(9),
        "txt_ids": torch.zeros(5, 3),
        **further,
    }


def video(channels: int = 4, text: int = 10, **further: Any) -> Callable[[], dict[str, Any]]:
    """Three frames and a prompt."""
    return lambda: {"hidden_states": normal(channels, 3, 4, 4), "encoder_hidden_states": normal(6, text), **further}


IMAGES: dict[str, Example] = {
    "UNet2DModel": Example(
        UNET
        | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
        },
        lambda: {"sample": normal(4, 8, 8)},
    ),
    "UNet2DConditionModel": Example(
        UNET
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 12,
            "attention_head_dim": 4,
        },
        lambda: {"sample": normal(4, 8, 8), "encoder_hidden_states": normal(5, 12)},
    ),
    "DiTTransformer2DModel": Example(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "sample_size": 8,
            "num_embeds_ada_norm": 6,
        },
        lambda: {"hidden_states": normal(4, 8, 8), "class_labels": torch.tensor([1, 4])},
    ),
    "PixArtTransformer2DModel": Example(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "cross_attention_dim": 24,
            "caption_channels": 10,
            "sample_size": 8,
            "use_additional_conditions": False,
        },
        lambda: {
            "hidden_states": normal(4, 8, 8),
            "encoder_hidden_states": normal(6, 10),
            "encoder_attention_mask": mask(6).float(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3Transformer2DModel": Example(
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 6,
            "pos_embed_max_size": 8,
        },
        lambda: {
            "hidden_states": normal(4, 8, 8),
            "encoder_hidden_states": normal(5, 12),
            "pooled_projections": normal(6),
        },
    ),
    "FluxTransformer2DModel": Example(
        FLUX | {"pooled_projection_dim": 6}, lambda: {**packed()(), "pooled_projections": normal(6)}, unit=1.0
    ),
    "Flux2Transformer2DModel": Example(
        FLUX | {"axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 8},
        lambda: {
            "hidden_states": normal(9, 4),
            "encoder_hidden_states": normal(5, 12),
            "img_ids": ids(9, 4).expand(B, 9, 4),
            "txt_ids": torch.zeros(B, 5, 4),
            "guidance": torch.full((B,), 3.5),
        },
        unit=1.0,
    ),
    "ChromaTransformer2DModel": Example(
        FLUX | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        packed(),
        unit=1.0,
    ),
    "BriaTransformer2DModel": Example(FLUX | {"axes_dims_rope": [0, 4, 4], "pooled_projection_dim": None}, packed()),
    "LongCatImageTransformer2DModel": Example(FLUX | {"axes_dims_rope": [2, 2, 4]}, packed(), unit=1.0),
    "OvisImageTransformer2DModel": Example(FLUX | {"out_channels": 4}, packed(), unit=1.0),
    "AuraFlowTransformer2DModel": Example(
        {
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 16,
        },
        lambda: {"hidden_states": normal(4, 8, 8), "encoder_hidden_states": normal(5, 12)},
        unit=1.0,
    ),
    "QwenImageTransformer2DModel": Example(
        {
            "in_channels": 8,
            "out_channels": 2,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda: {
            "hidden_states": normal(9, 8),
            "encoder_hidden_states": normal(5, 12),
            "encoder_hidden_states_mask": mask(5).long(),
            "img_shapes": [(1, 3, 3)] * B,
        },
        unit=1.0,
    ),
    "ZImageTransformer2DModel": Example(
        {
            "in_channels": 4,
            "dim": 16,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 1,
            "n_kv_heads": 1,
            "cap_feat_dim": 10,
            "axes_dims": [8, 4, 4],
            "axes_lens": [64, 16, 16],
        },
        lambda: {
            "x": [torch.randn(4, 1, 8, 8) for _ in range(B)],
            "cap_feats": [torch.randn(5, 10), torch.randn(7, 10)],
        },
        timestep="t",
        unit=1.0,
    ),
    "Lumina2Transformer2DModel": Example(
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 16,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": 10,
        },
        lambda: {
            "hidden_states": normal(4, 8, 8),
            "encoder_hidden_states": normal(6, 10),
            "encoder_attention_mask": mask(6),
        },
        unit=1.0,
    ),
    "SanaTransformer2DModel": Example(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 10,
            "sample_size": 8,
            "patch_size": 1,
        },
        lambda: {
            "hidden_states": normal(4, 8, 8),
            "encoder_hidden_states": normal(6, 10),
            "encoder_attention_mask": mask(6).float(),
        },
    ),
    "HunyuanDiT2DModel": Example(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 6,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
        },
        lambda: {
            "hidden_states": normal(4, 8, 8),
            "encoder_hidden_states": normal(4, 8),
            "text_embedding_mask": mask(4).float(),
            "encoder_hidden_states_t5": normal(4, 8),
            "text_embedding_mask_t5": mask(4).float(),
            "image_meta_size": torch.full((B, 6), 64.0),
            "style": torch.zeros(B, dtype=torch.long),
            "image_rotary_emb": (torch.ones(1, 8), torch.zeros(1, 8)),
        },
    ),
    "HiDreamImageTransformer2DModel": Example(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": [10, 6],
            "text_emb_dim": 12,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (16, 16),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        lambda: {
            "hidden_states": normal(4, 8, 8),
            "encoder_hidden_states_t5": normal(5, 10),
            "encoder_hidden_states_llama3": torch.randn(2, B, 5, 6),
            "pooled_embeds": normal(12),
        },
        timestep="timesteps",
    ),
    "CogView3PlusTransformer2DModel": Example(
        {
            "num_layers": 1,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 10,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        lambda: {
            "hidden_states": normal(4, 8, 8),
            "encoder_hidden_states": normal(6, 10),
            **{name: torch.full((B, 2), 64.0) for name in ("original_size", "target_size", "crop_coords")},
        },
    ),
    "CogView4Transformer2DModel": Example(
        {
            "num_layers": 1,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 10,
            "time_embed_dim": 8,
            "condition_dim": 4,
        },
        lambda: {
            "hidden_states": normal(4, 8, 8),
            "encoder_hidden_states": normal(6, 10),
            **{name: torch.full((B, 2), 64.0) for name in ("original_size", "target_size", "crop_coords")},
        },
    ),
    "PRXTransformer2DModel": Example(
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 10,
            "hidden_size": 16,
            "num_heads": 2,
            "depth": 1,
            "axes_dim": [4, 4],
        },
        lambda: {"hidden_states": normal(4, 8, 8), "encoder_hidden_states": normal(6, 10)},
        unit=1.0,
    ),
}
"""Denoisers of images."""

VIDEO: dict[str, Example] = {
    "WanTransformer3DModel": Example(WAN, video()),
    "SkyReelsV2Transformer3DModel": Example(WAN, video()),
    "ChronoEditTransformer3DModel": Example(WAN, video()),
    "WanVACETransformer3DModel": Example(
        WAN | {"num_layers": 2, "vace_layers": [0], "vace_in_channels": 6},
        lambda: {**video()(), "control_hidden_states": normal(6, 3, 4, 4)},
    ),
    "LTXVideoTransformer3DModel": Example(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 1,
            "caption_channels": 10,
        },
        lambda: {
            "hidden_states": normal(18, 4),
            "encoder_hidden_states": normal(6, 10),
            "encoder_attention_mask": mask(6),
            "num_frames": 2,
            "height": 3,
            "width": 3,
        },
    ),
    "CogVideoXTransformer3DModel": Example(
        COGVIDEO, lambda: {"hidden_states": normal(2, 4, 8, 8), "encoder_hidden_states": normal(6, 10)}
    ),
    "MochiTransformer3DModel": Example(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 6,
        },
        lambda: {
            "hidden_states": normal(4, 2, 4, 4),
            "encoder_hidden_states": normal(6, 16),
            "encoder_attention_mask": mask(6),
        },
    ),
    "AllegroTransformer3DModel": Example(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "cross_attention_dim": 24,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 2,
            "caption_channels": 10,
        },
        lambda: {"hidden_states": normal(4, 2, 4, 4), "encoder_hidden_states": normal(6, 10)},
    ),
    "HunyuanVideoTransformer3DModel": Example(
        HUNYUAN,
        lambda: {
            **video(pooled_projections=None)(),
            "pooled_projections": normal(6),
            "encoder_attention_mask": mask(6).float(),
            "guidance": torch.full((B,), 6000.0),
        },
    ),
    "LatteTransformer3DModel": Example(
        {
            "sample_size": 8,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": 10,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 1000,
            "patch_size": 2,
            "video_length": 3,
        },
        lambda: {"hidden_states": normal(4, 3, 8, 8), "encoder_hidden_states": normal(6, 10)},
    ),
    "SanaVideoTransformer3DModel": Example(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 10,
            "sample_size": 4,
            "rope_max_seq_len": 16,
        },
        video(),
    ),
    "UNet3DConditionModel": Example(
        UNET
        | {
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 12,
            "attention_head_dim": 4,
        },
        lambda: {"sample": normal(4, 3, 8, 8), "encoder_hidden_states": normal(5, 12)},
    ),
    "UNetMotionModel": Example(
        UNET
        | {
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "cross_attention_dim": 12,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            "motion_max_seq_length": 4,
        },
        lambda: {"sample": normal(4, 3, 8, 8), "encoder_hidden_states": torch.randn(3 * B, 5, 12)},
    ),
}
"""Denoisers of video."""

SOUND: dict[str, Example] = {
    "UNet1DModel": Example(
        {
            "sample_size": 16,
            "in_channels": 2,
            "out_channels": 2,
            "extra_in_channels": 64,
            "block_out_channels": (32, 32),
            "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"),
            "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip"),
        },
        lambda: {"sample": normal(2, 16)},
        unit=1.0,
    ),
    "AceStepTransformer1DModel": Example(
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 4,
        },
        lambda: {
            "hidden_states": normal(8, 4),
            "encoder_hidden_states": normal(6, 16),
            "context_latents": normal(8, 8),
            "timestep_r": torch.tensor([0.8, 0.1]),
        },
        unit=1.0,
    ),
    "LongCatAudioDiTTransformer": Example(
        {"dit_dim": 16, "dit_depth": 1, "dit_heads": 2, "dit_text_dim": 10, "latent_dim": 4, "text_conv": False},
        lambda: {
            "hidden_states": normal(8, 4),
            "encoder_hidden_states": normal(6, 10),
            "encoder_attention_mask": mask(6),
            "attention_mask": mask(8),
        },
        unit=1.0,
    ),
}
"""Denoisers of sound."""

USUAL: dict[str, Example] = {**IMAGES, **VIDEO, **SOUND}
"""By class name."""
