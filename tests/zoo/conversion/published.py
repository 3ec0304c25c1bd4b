"""Settings of the published models, as their repositories' YAML files state them, and small models of each kind."""

from __future__ import annotations

import copy
from typing import Any

DDIM_CIFAR10: dict[str, Any] = {
    "data": {"dataset": "CIFAR10", "image_size": 32, "channels": 3, "rescaled": True},
    "model": {
        "type": "simple",
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 2, 2],
        "num_res_blocks": 2,
        "attn_resolutions": [16],
        "dropout": 0.1,
        "var_type": "fixedlarge",
        "ema_rate": 0.9999,
        "ema": True,
        "resamp_with_conv": True,
    },
    "diffusion": {
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "num_diffusion_timesteps": 1000,
    },
}


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with other values; `a__b` names the key b within a."""
    made = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = made
        for parent in parents:
            place = place[parent]
        place[key] = value
    return made


DDIM_LSUN = changed(
    DDIM_CIFAR10,
    data__dataset="LSUN",
    data__image_size=256,
    model__ch_mult=[1, 1, 2, 2, 4, 4],
    model__dropout=0.0,
    model__var_type="fixedsmall",
)
DDIM_SMALL = changed(
    DDIM_CIFAR10,
    data__image_size=16,
    model__ch=32,
    model__ch_mult=[1, 2, 2],
    model__attn_resolutions=[8],
)

VQ_F4 = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 3,
        "n_embed": 8192,
        "ddconfig": {
            "double_z": False,
            "z_channels": 3,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 128,
            "ch_mult": [1, 2, 4],
            "num_res_blocks": 2,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}
KL_F8 = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "monitor": "val/rec_loss",
        "ddconfig": {**VQ_F4["params"]["ddconfig"], "double_z": True, "z_channels": 4, "ch_mult": [1, 2, 4, 4]},  # type: ignore[dict-item]
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}
UNET_TARGET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"


def latent(unet: dict[str, Any], first_stage: dict[str, Any], condition: Any, **params: Any) -> dict[str, Any]:
    """A YAML file of latent diffusion."""
    values = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 1000,
        "image_size": unet["image_size"],
        "channels": unet["in_channels"],
        "monitor": "val/loss",
        "unet_config": {"target": UNET_TARGET, "params": unet},
        "first_stage_config": first_stage,
        "cond_stage_config": condition,
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": values | params}}


BEDROOMS = latent(
    {
        "image_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 224,
        "attention_resolutions": [8, 4, 2],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 3, 4],
        "num_head_channels": 32,
    },
    VQ_F4,
    "__is_unconditional__",
)
CHURCHES = latent(
    {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 192,
        "attention_resolutions": [1, 2, 4, 8],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 2, 4, 4],
        "num_heads": 8,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
    KL_F8,
    "__is_unconditional__",
    linear_end=0.0155,
    scale_by_std=True,
)
IMAGENET = latent(
    {
        "image_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 192,
        "attention_resolutions": [8, 4, 2],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 3, 5],
        "num_heads": 1,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 512,
    },
    VQ_F4,
    {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"n_classes": 1001, "embed_dim": 512, "key": "class_label"},
    },
    conditioning_key="crossattn",
    use_ema=False,
)
STABLE_DIFFUSION = latent(
    {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 768,
        "use_checkpoint": True,
        "legacy": False,
    },
    changed(KL_F8, params__ddconfig__resolution=512),
    {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    linear_start=0.00085,
    linear_end=0.012,
    image_size=64,
    scale_factor=0.18215,
    use_ema=False,
)

VQ_SMALL = changed(VQ_F4, params__n_embed=40, params__ddconfig__ch=32, params__ddconfig__resolution=32)
KL_SMALL = changed(
    KL_F8,
    params__ddconfig__ch=32,
    params__ddconfig__ch_mult=[1, 2],
    params__ddconfig__num_res_blocks=1,
    params__ddconfig__resolution=16,
)
FIRST = "model__params__first_stage_config"
UNET = "model__params__unet_config__params__"


def small(config: dict[str, Any], first_stage: dict[str, Any], **unet: Any) -> dict[str, Any]:
    """A small model of the same kind."""
    size = {"image_size": 8, "model_channels": 32, "num_res_blocks": 2} | unet
    return changed(
        config, **{FIRST: first_stage}, model__params__image_size=8, **{UNET + k: v for k, v in size.items()}
    )


SMALL_LATENT = {
    "bedrooms": small(BEDROOMS, VQ_SMALL, channel_mult=[1, 2, 3, 4], num_head_channels=16),
    "churches": small(CHURCHES, KL_SMALL, channel_mult=[1, 2, 2, 4], attention_resolutions=[1, 2], num_heads=4),
    "imagenet": small(IMAGENET, VQ_SMALL, channel_mult=[1, 2, 3], attention_resolutions=[4, 2], context_dim=24),
}
SMALL_LATENT["imagenet"]["model"]["params"]["cond_stage_config"]["params"].update(n_classes=6, embed_dim=24)
