"""CompVis' checkpoints: latent diffusion, unconditional and class-conditional, and Stable Diffusion 1.x."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from tcaq_lightning.errors import UserError
from tcaq_lightning.zoo.conversion.architecture import Architecture, Component
from tcaq_lightning.zoo.conversion.checkpoint import State, ema_of_latent_diffusion, listing, tensors

DENOISER = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
CLASS_EMBEDDER = "cond_stage_model.embedding."
TEXT_ENCODER = "cond_stage_model.transformer."
TRAINING_ONLY = (
    *("model_ema.", f"{FIRST_STAGE}loss.", f"{FIRST_STAGE}model_ema.", "logvar", "scale_factor"),
    *("betas", "alphas_cumprod", "sqrt_", "log_one_minus_alphas_cumprod", "posterior_", "lvlb_weights", "cond_ids"),
    f"{TEXT_ENCODER}text_model.embeddings.position_ids",
)
"""What a checkpoint holds beside its networks: averages, losses, tables of the schedule."""


def find_weights(content: Any, ema: bool | None) -> tuple[State, bool] | None:
    """Weights of a CompVis checkpoint.

    Args:
        content: a Lightning checkpoint with a `state_dict`, or a plain state dict.
        ema: whether the denoiser's moving average is wanted; None takes it where there is one.

    Returns:
        All weights, the denoiser's averaged if they are wanted so, and whether they are; None if the content is
        something else.

    Raises:
        UserError: an average is asked for and there is none, or it is incomplete.
    """
    state = tensors(content.get("state_dict", content)) if isinstance(content, dict) else None
    if state is None or not any(k.startswith(DENOISER) for k in state):
        return None
    averaged = {} if ema is False else ema_of_latent_diffusion(state)
    if ema and not averaged:
        raise UserError("--ema true: expected a checkpoint with a moving average, got one without; leave --ema out")
    return state | averaged, bool(averaged)


def scale_factor(state: State) -> float | None:
    """Factor of the latents, if training measured it."""
    return float(state["scale_factor"]) if "scale_factor" in state else None


def convert(state: State, architecture: Architecture) -> dict[str, State]:
    """The checkpoint's weights by component, under diffusers' names.

    Raises:
        UserError: weights that belong to none of the components.
    """
    parts = {
        DENOISER: ("unet", convert_unet),
        FIRST_STAGE: ("vqvae" if "vqvae" in architecture.components else "vae", convert_first_stage),
        CLASS_EMBEDDER: ("class_embedder", convert_class_embedder),
        TEXT_ENCODER: ("text_encoder", convert_text_encoder),
    }
    sorted_out: dict[str, State] = {prefix: {} for prefix in parts}
    unknown = []
    for key, value in state.items():
        if key.startswith(TRAINING_ONLY):
            continue
        prefix = next(
            (p for p, (name, _) in parts.items() if key.startswith(p) and name in architecture.components), None
        )
        if prefix is None:
            unknown.append(key)
        else:
            sorted_out[prefix][key.removeprefix(prefix)] = value
    if unknown:
        raise UserError(
            f"a {architecture.pipeline} has no place for weights of the checkpoint, {listing(unknown)}; give the "
            f"config of this checkpoint (--architecture)"
        )
    return {
        name: function(sorted_out[prefix], component)
        for prefix, (name, function) in parts.items()
        if (component := architecture.components.get(name)) is not None
    }


def convert_unet(state: State, unet: Component) -> State:
    """Weights of `UNetModel`, without prefix, under the names of `UNet2DConditionModel` or `UNet2DModel`.

    Raises:
        UserError: weights that do not map.
    """
    if unet.name != "UNet2DConditionModel":
        return _convert_unconditional(state, unet)
    return _by_diffusers("unet", DENOISER, convert_ldm_unet_checkpoint, state, unet)


def convert_first_stage(state: State, vae: Component) -> State:
    """Weights of `VQModelInterface` or `AutoencoderKL`, without prefix, under the names of diffusers' counterpart.

    Raises:
        UserError: weights that do not map.
    """
    beyond: State = {}  # what diffusers' converter does not know
    rest: State = {}
    for key, value in state.items():
        if key == "quantize.embedding.weight":
            beyond[key] = value
        elif matched := re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d+)\.attn\.(\d+)\.(\w+)\.(\w+)", key):
            part, way, place, index, layer, kind = matched.groups()
            place = place if way == "down" else str(len(vae.config["block_out_channels"]) - 1 - int(place))
            name = f"{part}.{way}_blocks.{place}.attentions.{index}.{ATTENTION.get(layer, layer)}.{kind}"
            beyond[name] = value[:, :, 0, 0] if value.ndim == 4 else value
        else:
            rest[key] = value
    return beyond | _by_diffusers("first stage", FIRST_STAGE, convert_ldm_vae_checkpoint, rest, vae)


def convert_class_embedder(state: State, _: Component) -> State:
    """The embedding's one weight."""
    return {f"embedding.{k}": v for k, v in state.items()}


def convert_text_encoder(state: State, text_encoder: Component) -> State:
    """Weights of CLIP's text model under the names that the installed transformers gives them."""
    with torch.device("meta"):
        cls = text_encoder.load_class()
        expected = cls(cls.config_class(**text_encoder.config)).state_dict()
    prefix = "" if any(k.startswith("text_model.") for k in expected) else "text_model."
    return {k.removeprefix(prefix): v for k, v in state.items()}


def _by_diffusers(name: str, prefix: str, converter: Callable[..., State], state: State, component: Component) -> State:
    """Diffusers' own converter, and an error for every weight that it leaves out in silence."""
    try:
        converted = converter({prefix + k: v for k, v in state.items()}, component.config)
    except Exception as error:  # it takes the weights' names on trust
        raise UserError(
            f"{name}: the checkpoint does not fit a {component.name} of this config ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); give its own --architecture"
        ) from error
    taken = {_address(v) for v in converted.values()}
    if left := [k for k, v in state.items() if _address(v) not in taken]:
        raise UserError(
            f"{name}: the checkpoint has weights that do not map, {listing(left)}; give its own --architecture"
        )
    return converted


def _address(value: torch.Tensor) -> tuple[int, int]:
    """Where a weight, or a view of it without its trailing axes, is stored."""
    return value.untyped_storage().data_ptr(), int(value.storage_offset())


ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def _convert_unconditional(state: State, unet: Component) -> State:
    """Diffusers has no converter for `UNetModel` with plain attention blocks."""
    layers = int(unet.config["layers_per_block"])
    heads, per_head = unet.config.get("num_attention_heads"), unet.config.get("attention_head_dim")
    converted: State = {}
    unknown = []
    for key, value in state.items():
        place, kind = key.rsplit(".", 1)
        name = _place(place, layers)
        if name is None:
            unknown.append(key)
        elif name.endswith(".qkv"):
            channels = value.shape[0] // 3
            count = heads or (channels // per_head if per_head else 1)
            # (3C, ...) with each head's q, k and v side by side, to three of (C, ...)
            split = value.reshape(count, 3, channels // count, *value.shape[1:2]).unbind(1)
            for letter, part in zip("qkv", split, strict=True):
                converted[f"{name.removesuffix('qkv')}to_{letter}.{kind}"] = part.flatten(0, 1)
        elif ".attentions." in name and value.ndim == 3:
            converted[f"{name}.{kind}"] = value[:, :, 0]
        else:
            converted[f"{name}.{kind}"] = value
    if unknown:
        raise UserError(
            f"unet: the checkpoint has weights that do not map, {listing(unknown)}; give its own --architecture"
        )
    return converted


def _place(place: str, layers: int) -> str | None:
    """Diffusers' name of a layer of `UNetModel`; None if it is not known.

    >>> _place("input_blocks.3.0.op", layers=2), _place("output_blocks.4.1.qkv", layers=2)
    ('down_blocks.0.downsamplers.0.conv', 'up_blocks.1.attentions.1.qkv')
    """
    if place in OUTER:
        return OUTER[place]
    if matched := re.fullmatch(r"middle_block\.([012])\.(.+)", place):
        index, layer = int(matched[1]), matched[2]
        names = ATTENTION | {"qkv": "qkv"} if index == 1 else RESIDUAL
        found = names.get(layer)
        return found and (
            f"mid_block.attentions.0.{found}" if index == 1 else f"mid_block.resnets.{index // 2}.{found}"
        )
    matched = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", place)
    if matched is None:
        return None
    down, number, part, layer = matched[1] == "input", int(matched[2]), int(matched[3]), matched[4]
    # An input level is `layers` blocks and a downsampler; an output level `layers` + 1 blocks, the last one upsampling.
    level, index = divmod(number - 1 if down else number, layers + 1)
    way = "down" if down else "up"
    if layer in ("op", "conv"):
        return f"{way}_blocks.{level}.{way}samplers.0.conv"
    if layer in RESIDUAL:
        resampling = index == layers if down else part > 0
        where = f"{way}samplers.0" if resampling else f"resnets.{index}"
        return f"{way}_blocks.{level}.{where}.{RESIDUAL[layer]}"
    if layer == "qkv" or layer in ATTENTION:
        return f"{way}_blocks.{level}.attentions.{index}.{ATTENTION.get(layer, layer)}"
    return None
