"""Diffusers' counterparts of the YAML files of CompVis' latent diffusion and Stable Diffusion 1.x."""

from __future__ import annotations

from typing import Any

from tcaq_lightning.errors import UserError
from tcaq_lightning.zoo.conversion.architecture import Architecture, Component
from tcaq_lightning.zoo.conversion.settings import Section

UNET_KEYS = {
    *("image_size", "in_channels", "out_channels", "model_channels", "attention_resolutions", "num_res_blocks"),
    *("channel_mult", "num_heads", "num_head_channels", "num_heads_upsample", "use_scale_shift_norm"),
    *("resblock_updown", "use_spatial_transformer", "transformer_depth", "context_dim", "dropout", "legacy"),
    *("use_checkpoint", "use_fp16", "dims", "conv_resample", "num_classes", "n_embed", "use_new_attention_order"),
    "use_linear_in_transformer",
}
AUTOENCODER_KEYS = {
    *("double_z", "z_channels", "resolution", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks"),
    *("attn_resolutions", "dropout", "resamp_with_conv", "attn_type", "use_linear_attn", "tanh_out", "give_pre_end"),
}
BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear"}
"""CompVis' names and diffusers': theirs is linear in sqrt(beta) where it says `linear`."""
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
UNCONDITIONAL = "__is_unconditional__"


def architecture(config: dict[str, Any]) -> Architecture:
    """Diffusers' counterpart of a YAML file of latent diffusion.

    Args:
        config: content of the file. Where training measured the latents' factor (`scale_by_std`), only the checkpoint
            has it, and it is 1 here.

    Raises:
        UserError: a key is missing, or a setting has no counterpart.
    """
    params = Section(config).section("model").section("params")
    network = params.section("unet_config")
    _expect_class(network, ("UNetModel",))
    unet = network.section("params")
    unet.only(UNET_KEYS)
    unet.must_be(
        dims=2, conv_resample=True, num_classes=None, n_embed=None, use_new_attention_order=False, num_heads_upsample=-1
    )
    first_stage = _first_stage(params.section("first_stage_config"), params.get("scale_factor", float, 1.0))
    size = params.get("image_size", int)
    condition = params.values.get("cond_stage_config", UNCONDITIONAL)
    if condition == UNCONDITIONAL:
        components = {"vqvae": first_stage, "unet": _unconditional(unet, size), "scheduler": _ddim(params)}
        return Architecture("LDMPipeline", dict(components))
    stage = params.section("cond_stage_config")
    kind = _expect_class(stage, ("ClassEmbedder", "FrozenCLIPEmbedder"))
    denoiser = _conditional(unet, size)
    if kind == "FrozenCLIPEmbedder":
        return _stable_diffusion(first_stage, denoiser, params)
    sizes = stage.section("params")
    rows = sizes.get("n_classes", int)
    embedder = {"num_classes": rows - 1, "embedding_dim": sizes.get("embed_dim", int)}  # the last row: no class
    return Architecture(
        "ClassConditionalLatentPipeline",
        {
            "vae": first_stage,
            "unet": denoiser,
            "scheduler": _ddim(params),
            "class_embedder": Component("tcaq_lightning.models.class_conditional", "ClassEmbedder", embedder),
        },
    )


def _expect_class(section: Section, classes: tuple[str, ...]) -> str:
    """Last part of a section's `target`, which must be one of the classes."""
    target = section.get("target", str)
    name = target.rsplit(".", 1)[-1]
    if name not in classes:
        raise UserError(f"--architecture: {section.name}.target must be a {' or '.join(classes)}, got {target}")
    return name


def _levels(unet: Section) -> tuple[list[int], list[bool]]:
    """Channels of each resolution, and whether it has attention."""
    width, attended = unet.get("model_channels", int), unet.ints("attention_resolutions")
    multipliers = unet.multipliers("channel_mult")
    return [width * m for m in multipliers], [2**i in attended for i in range(len(multipliers))]


def _common(unet: Section, size: int, down: list[str]) -> dict[str, Any]:
    """Settings of either UNet. `down` names its blocks from the finest resolution to the coarsest."""
    return {
        "sample_size": size,
        "in_channels": unet.get("in_channels", int),
        "out_channels": unet.get("out_channels", int),
        "block_out_channels": _levels(unet)[0],
        "layers_per_block": unet.get("num_res_blocks", int),
        "down_block_types": down,
        "up_block_types": [d.replace("Down", "Up", 1).replace("downsample", "upsample") for d in reversed(down)],
        "dropout": unet.get("dropout", float, 0.0),
    }


def _heads(unet: Section, channels: list[int]) -> list[int]:
    """Heads of attentions of so many channels."""
    per_head, heads = unet.get("num_head_channels", int, -1), unet.get("num_heads", int, -1)
    if per_head < 1 and heads < 1:
        raise UserError("--architecture: unet_config needs num_heads or num_head_channels, got neither")
    divisor = per_head if per_head > 0 else heads
    if any(c % divisor for c in channels):
        raise UserError(
            f"--architecture: unet_config's heads must divide the attentions' channels {channels}, got {divisor}"
        )
    return [c // per_head if per_head > 0 else heads for c in channels]


def _unconditional(unet: Section, size: int) -> Component:
    """Attention blocks without context: `UNet2DModel`, or its sibling if it is the number of heads that is fixed."""
    if unet.get("use_spatial_transformer", bool, False):
        raise UserError(
            "--architecture: unet_config has a spatial transformer, got an unconditional model; expected a context"
        )
    channels, attended = _levels(unet)
    resblocks, film = unet.get("resblock_updown", bool, False), unet.get("use_scale_shift_norm", bool, False)
    without = "ResnetDownsampleBlock2D" if resblocks else "DownBlock2D"
    config = _common(unet, size, ["AttnDownBlock2D" if a else without for a in attended])
    if resblocks:
        config |= {"downsample_type": "resnet", "upsample_type": "resnet"}
    if film:
        config |= {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32}
    widths = sorted(
        {c for c, a in zip(channels, attended, strict=True) if a} | {channels[-1]}
    )  # the middle has one too
    heads = _heads(unet, widths)
    if set(heads) == {1}:
        return Component("diffusers", "UNet2DModel", config | {"attention_head_dim": None})
    sizes = {w // h for w, h in zip(widths, heads, strict=True)}
    if len(sizes) == 1:
        return Component("diffusers", "UNet2DModel", config | {"attention_head_dim": sizes.pop()})
    return Component("tcaq_lightning.models.unets", "FixedHeadsUNet2DModel", config | {"num_attention_heads": heads[0]})


def _conditional(unet: Section, size: int) -> Component:
    """Transformers that read a context: `UNet2DConditionModel`."""
    if not unet.get("use_spatial_transformer", bool, False):
        raise UserError(
            "--architecture: unet_config.use_spatial_transformer must be true for a conditional model, got false"
        )
    unet.must_be(resblock_updown=False, use_scale_shift_norm=False)
    channels, attended = _levels(unet)
    config = _common(unet, size, ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended])
    heads = _heads(unet, channels)
    config |= {
        "cross_attention_dim": unet.get("context_dim", int),
        # diffusers' name for the number of heads of each resolution
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "transformer_layers_per_block": unet.get("transformer_depth", int, 1),
    }
    if unet.get("use_linear_in_transformer", bool, False):
        config["use_linear_projection"] = True
    return Component("diffusers", "UNet2DConditionModel", config)


def _first_stage(stage: Section, scale_factor: float) -> Component:
    kind = _expect_class(stage, ("VQModelInterface", "AutoencoderKL"))
    params = stage.section("params")
    network = params.section("ddconfig")
    network.only(AUTOENCODER_KEYS)
    network.must_be(
        resamp_with_conv=True, attn_type="vanilla", use_linear_attn=False, tanh_out=False, give_pre_end=False
    )
    network.must_be(double_z=kind == "AutoencoderKL")
    size, attended = network.get("resolution", int), network.ints("attn_resolutions")
    multipliers, width = network.multipliers("ch_mult"), network.get("ch", int)
    with_attention = [size // 2**i in attended for i in range(len(multipliers))]
    down = ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in with_attention]
    up = ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(with_attention)]
    latents, embedded = network.get("z_channels", int), params.get("embed_dim", int)
    config = {
        "in_channels": network.get("in_channels", int),
        "out_channels": network.get("out_ch", int),
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": [width * m for m in multipliers],
        "layers_per_block": network.get("num_res_blocks", int),
        "latent_channels": latents,
        "sample_size": size,
        "scaling_factor": scale_factor,
    }
    if kind == "VQModelInterface":
        config |= {"num_vq_embeddings": params.get("n_embed", int), "vq_embed_dim": embedded}
        return Component("diffusers", "VQModel", config)
    if embedded != latents:
        raise UserError(f"--architecture: {params.name}.embed_dim must be z_channels, {latents}, got {embedded}")
    return Component("diffusers", "AutoencoderKL", config)


def _schedule(params: Section) -> dict[str, Any]:
    kind, prediction = params.get("beta_schedule", str, "linear"), params.get("parameterization", str, "eps")
    for key, value, known in (
        ("beta_schedule", kind, BETA_SCHEDULES),
        ("parameterization", prediction, PREDICTIONS),
    ):
        if value not in known:
            raise UserError(f"--architecture: {params.name}.{key} must be one of {', '.join(known)}, got {value!r}")
    return {
        "num_train_timesteps": params.get("timesteps", int, 1000),
        "beta_start": params.get("linear_start", float, 1e-4),
        "beta_end": params.get("linear_end", float, 2e-2),
        "beta_schedule": BETA_SCHEDULES[kind],
        "prediction_type": PREDICTIONS[prediction],
        # CompVis' samplers visit 1, 1 + T/S, ...; the last step leads to alpha-bar of timestep 0
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",
    }


def _ddim(params: Section) -> Component:
    return Component("diffusers", "DDIMScheduler", _schedule(params) | {"clip_sample": False})


def _stable_diffusion(vae: Component, unet: Component, params: Section) -> Architecture:
    """Stable Diffusion 1.x. Its text encoder is CLIP ViT-L/14's, which the YAML file does not describe."""
    text_encoder = {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    return Architecture(
        "StableDiffusionPipeline",
        {
            "vae": vae,
            "text_encoder": Component("transformers", "CLIPTextModel", text_encoder),
            "tokenizer": None,
            "unet": unet,
            "scheduler": Component("diffusers", "PNDMScheduler", _schedule(params) | {"skip_prk_steps": True}),
            "safety_checker": None,
            "feature_extractor": None,
        },
    )
