"""The DDIM repository's network (ermongroup/ddim, models/diffusion.py): DDPM checkpoints of CIFAR-10 and LSUN."""

from __future__ import annotations

import re
from typing import Any

from tcaq_lightning.errors import UserError
from tcaq_lightning.zoo.conversion.architecture import Architecture, Component
from tcaq_lightning.zoo.conversion.checkpoint import State, listing, tensors
from tcaq_lightning.zoo.conversion.settings import Section

TELLTALE = "temb.dense.0.weight"
"""A weight that only this network has."""
MODEL_KEYS = {
    *("type", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resamp_with_conv"),
    *("dropout", "var_type", "ema_rate", "ema"),
}
"""What a config's `model` may say; anything else changes the network in a way that is not known here."""


def find_weights(content: Any, ema: bool | None) -> tuple[State, bool] | None:
    """Weights of a checkpoint of the DDIM repository.

    Args:
        content: a plain state dict, or the list that training saves: weights, optimizer, epoch, step and, if it kept
            one, the moving average, last.
        ema: whether the average is wanted; None takes it where there is one.

    Returns:
        The weights, and whether they are an average; None if the content is something else.

    Raises:
        UserError: an average is asked for and there is none.
    """
    if isinstance(content, list) and content:
        raw = tensors(content[0])
        averaged = tensors(content[-1]) if len(content) > 4 else None
    else:
        raw, averaged = tensors(content), None
    if raw is None or TELLTALE not in raw:
        return None
    if ema and averaged is None:
        raise UserError("--ema true: expected a checkpoint with a moving average, got one without; leave --ema out")
    if averaged is not None and ema is not False:
        return averaged, True
    return raw, False


def architecture(config: dict[str, Any]) -> Architecture:
    """Diffusers' counterpart of a config in the DDIM repository's format.

    Args:
        config: with `data.image_size`, `model` and `diffusion`.

    Raises:
        UserError: a key is missing, or a setting has no counterpart.
    """
    top = Section(config)
    model, data, diffusion = top.section("model"), top.section("data"), top.section("diffusion")
    model.only(MODEL_KEYS)
    model.must_be(resamp_with_conv=True, type="simple")
    data.must_be(rescaled=True, logit_transform=False)  # images in [-1, 1]
    diffusion.must_be(beta_schedule="linear")
    width, multipliers = model.get("ch", int), model.multipliers("ch_mult")
    size, attended = data.get("image_size", int), model.ints("attn_resolutions")
    down = ["AttnDownBlock2D" if size // 2**i in attended else "DownBlock2D" for i in range(len(multipliers))]
    unet = {
        "sample_size": size,
        "in_channels": model.get("in_channels", int),
        "out_channels": model.get("out_ch", int),
        "block_out_channels": [width * m for m in multipliers],
        "layers_per_block": model.get("num_res_blocks", int),
        "down_block_types": down,
        "up_block_types": [d.replace("Down", "Up") for d in reversed(down)],
        "dropout": model.get("dropout", float, 0.0),
        "attention_head_dim": None,  # one head
        "downsample_padding": 0,  # stands for one row and column at the far edges
        "norm_eps": 1e-6,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    }
    scheduler = {
        "num_train_timesteps": diffusion.get("num_diffusion_timesteps", int),
        "beta_start": diffusion.get("beta_start", float),
        "beta_end": diffusion.get("beta_end", float),
        "beta_schedule": "linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    }
    return Architecture(
        "DDIMPipeline",
        {
            "unet": Component("diffusers", "UNet2DModel", unet),
            "scheduler": Component("diffusers", "DDIMScheduler", scheduler),
        },
    )


RENAMED = (
    (r"^temb\.dense\.0\.", "time_embedding.linear_1."),
    (r"^temb\.dense\.1\.", "time_embedding.linear_2."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^mid\.block_1\.", "mid_block.resnets.0."),
    (r"^mid\.block_2\.", "mid_block.resnets.1."),
    (r"^mid\.attn_1\.", "mid_block.attentions.0."),
    (r"^(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
    (r"^(down|up)\.(\d+)\.attn\.", r"\1_blocks.\2.attentions."),
    (r"^(down|up)\.(\d+)\.(down|up)sample\.conv\.", r"\1_blocks.\2.\3samplers.0.conv."),
    (r"(resnets\.\d+)\.temb_proj\.", r"\1.time_emb_proj."),
    (r"(resnets\.\d+)\.nin_shortcut\.", r"\1.conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
"""The original names' parts, in the order in which they are replaced."""
LEADING = re.compile(r"^(conv_in|conv_out|conv_norm_out|time_embedding|mid_block|down_blocks|up_blocks)\.")


def rename(key: str, levels: int) -> str | None:
    """Diffusers' name of a weight of the original network; None if it is not known.

    >>> rename("up.3.block.0.nin_shortcut.weight", levels=4)
    'up_blocks.0.resnets.0.conv_shortcut.weight'
    """
    for pattern, replacement in RENAMED:
        key = re.sub(pattern, replacement, key)
    key = re.sub(
        r"^up_blocks\.(\d+)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", key
    )  # stored from fine to coarse
    return key if LEADING.match(key) else None


def convert_unet(state: State, unet: Component) -> State:
    """Weights of `Model` under the names of `UNet2DModel`, attentions' pointwise convolutions as linear layers.

    Raises:
        UserError: weights that the network does not have.
    """
    levels = len(unet.config["block_out_channels"])
    renamed = {key: rename(key, levels) for key in state}
    if unknown := [k for k, v in renamed.items() if v is None]:
        raise UserError(
            f"unet: the checkpoint has weights that do not map, {listing(unknown)}; expected those of `Model`"
        )
    converted = {}
    for key, value in state.items():
        name = str(renamed[key])
        converted[name] = value[:, :, 0, 0] if ".attentions." in name and value.ndim == 4 else value
    return converted
