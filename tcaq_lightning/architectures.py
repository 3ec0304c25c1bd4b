"""Models without weights: built from their configuration on the meta device, to plan with shapes alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.calls import Conditioning, Samples
from tcaq_lightning.errors import UserError
from tcaq_lightning.pipelines import ASSETS, DENOISER_NAMES, find_scheduler_class, sample_shape
from tcaq_lightning.unets import denoiser_class

ARCHITECTURES = ASSETS / "architectures"
"""Configurations, without weights, of published models in diffusers layout."""
TEXT_TOKENS, TIME_IDS = 77, 6
"""Of the text encoder of Stable Diffusion, and of the sizes that SDXL is told."""
PIXART_TOKENS, SD3_TOKENS, FLUX_TOKENS = 300, 333, 512
"""Of the text encoders of the transformers."""
TIMESTEP = 500.0
"""Of the example."""
FLUX_SIDE = 64
"""Side of the grid of packed latents at 1024 x 1024 pixels."""


def find_architecture(name: str) -> Path:
    """Directory of a model's configuration in diffusers layout.

    Args:
        name: of a shipped one, or a directory.

    Raises:
        UserError: there is none.
    """
    for path in (ARCHITECTURES / name, Path(name)):
        if name and (path / "model_index.json").is_file():
            return path
    known = ", ".join(known_architectures())
    raise UserError(
        f"model.architecture: no configuration called {name!r}; expected a directory with a "
        f"model_index.json, or one of {known}"
    )


def known_architectures() -> list[str]:
    """Names of the shipped configurations."""
    return sorted(path.parent.name for path in ARCHITECTURES.glob("*/model_index.json"))


def denoiser_settings(architecture: Path) -> dict[str, Any]:
    """The denoiser's config.json.

    Raises:
        UserError: there is none.
    """
    path = next((p for n in DENOISER_NAMES if (p := architecture / n / "config.json").is_file()), None)
    if path is None:
        raise UserError(f"model.architecture: {architecture} has no config.json of a {' or '.join(DENOISER_NAMES)}")
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def meta_denoiser(architecture: Path) -> nn.Module:
    """A pipeline's denoiser on the meta device."""
    return on_meta(denoiser_settings(architecture))


def on_meta(config: dict[str, Any]) -> nn.Module:
    """A denoiser on the meta device, from its configuration."""
    with torch.device("meta"):
        denoiser: nn.Module = denoiser_class(config["_class_name"]).from_config(config)
    return denoiser.requires_grad_(False).eval()


def architecture_scheduler(architecture: Path) -> Any:
    """A pipeline's own scheduler, from its configuration."""
    config = json.loads((architecture / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    return find_scheduler_class(config["_class_name"]).from_config(config)


def example_samples(denoiser: nn.Module, batch: int) -> Samples:
    """Noise in the shapes that a denoiser of a known class takes, on its device; what conditions it is zero.

    Args:
        denoiser: any of diffusers' that `CONDITIONING` lists, or an unconditional one.
        batch: B.
    """
    config: Any = denoiser.config
    device = next(denoiser.parameters()).device

    def empty(*shape: int) -> Tensor:
        return torch.zeros(batch, *shape, device=device)

    kind = getattr(denoiser, "denoiser_class", type(denoiser)).__name__  # an engine stands for a denoiser
    arguments = CONDITIONING[kind](config, empty) if kind in CONDITIONING else {}
    flux = kind == "FluxTransformer2DModel"
    x = torch.randn_like(empty(FLUX_SIDE**2, config.in_channels) if flux else empty(*sample_shape(denoiser)))
    return Samples(x, torch.full_like(empty(), TIMESTEP), Conditioning.of_call(arguments, batch))


Empty = Callable[..., Tensor]


def _unet(config: Any, empty: Empty) -> dict[str, Any]:
    known = config.get("num_class_embeds")
    return {"class_labels": empty().long()} if known else {}


def _conditional_unet(config: Any, empty: Empty) -> dict[str, Any]:
    arguments: dict[str, Any] = {"encoder_hidden_states": empty(TEXT_TOKENS, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {"text_embeds": empty(pooled), "time_ids": empty(TIME_IDS)}
    return arguments


def _dit(_: Any, empty: Empty) -> dict[str, Any]:
    return {"class_labels": empty().long()}


def _pixart(config: Any, empty: Empty) -> dict[str, Any]:
    sized = config.sample_size == 128
    sizes = {"resolution": empty(2) if sized else None, "aspect_ratio": empty(1) if sized else None}
    return {"encoder_hidden_states": empty(PIXART_TOKENS, config.caption_channels), "added_cond_kwargs": sizes}


def _sd3(config: Any, empty: Empty) -> dict[str, Any]:
    return {
        "encoder_hidden_states": empty(SD3_TOKENS, config.joint_attention_dim),
        "pooled_projections": empty(config.pooled_projection_dim),
    }


def _flux(config: Any, empty: Empty) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "encoder_hidden_states": empty(FLUX_TOKENS, config.joint_attention_dim),
        "pooled_projections": empty(config.pooled_projection_dim),
        "txt_ids": empty(FLUX_TOKENS, 3)[0],
        "img_ids": empty(FLUX_SIDE**2, 3)[0],
    }
    return arguments | ({"guidance": empty()} if config.guidance_embeds else {})


CONDITIONING: dict[str, Callable[[Any, Empty], dict[str, Any]]] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _conditional_unet,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
"""What a denoiser takes beside x_t and t, by its class: from its config and a maker of zeros with B rows."""
