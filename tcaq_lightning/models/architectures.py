"""Models without weights: built from their configuration on the meta device, to plan with shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.models.denoiser_calls import Conditioning, Samples
from tcaq_lightning.models.pipelines import ASSETS, DENOISER_NAMES, find_scheduler_class, sample_shape
from tcaq_lightning.models.unets import denoiser_class
from tcaq_lightning.runtime.json_files import read_json
from tcaq_lightning.runtime.one_line import one_line

ARCHITECTURES = ASSETS / "architectures"
"""Configurations, without weights, of published models in diffusers layout."""
TEXT_TOKENS, TIME_IDS = 77, 6
"""Lengths of Stable Diffusion's context, and of the sizes that SDXL takes as a condition."""
PIXART_TOKENS, SD3_TOKENS, FLUX_TOKENS = 300, 333, 512
"""Lengths of the transformers' contexts."""
TIMESTEP = 500.0
"""Timestep of the example."""
FLUX_SIDE = 64
"""Side of the grid of packed latents at 1024 x 1024 pixels."""


def find_architecture(name: str) -> Path:
    """Directory of a model's configuration in diffusers layout.

    Args:
        name: name of a shipped configuration, or a directory.

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
    return _settings(path, f"config.json of a {' or '.join(DENOISER_NAMES)}")


def _settings(path: Path, what: str) -> dict[str, Any]:
    """A component's config, which names its class."""
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.architecture: expected the {what} in {path}, got {one_line(error)}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("_class_name"), str):
        raise UserError(f"model.architecture: expected the {what} with a _class_name in {path}, got another JSON value")
    return settings


def meta_denoiser(architecture: Path) -> nn.Module:
    """A pipeline's denoiser on the meta device."""
    return on_meta(denoiser_settings(architecture))


def on_meta(config: dict[str, Any]) -> nn.Module:
    """A denoiser on the meta device, from its configuration."""
    name = str(config.get("_class_name"))
    known = denoiser_class(name, "model.architecture")
    try:
        with torch.device("meta"):
            denoiser: nn.Module = known.from_config(config)
    except Exception as error:  # diffusers' constructors raise each in its own way
        raise UserError(f"model.architecture: cannot make a {name}: {one_line(error)}") from error
    return denoiser.requires_grad_(False).eval()


def architecture_scheduler(architecture: Path) -> Any:
    """A pipeline's own scheduler, from its configuration."""
    config = _settings(architecture / "scheduler" / "scheduler_config.json", "scheduler_config.json")
    known = find_scheduler_class(config["_class_name"])
    if not hasattr(known, "set_timesteps"):
        raise UserError(f"model.architecture: the scheduler is a {config['_class_name']}, which diffusers lacks")
    try:
        return known.from_config(config)
    except Exception as error:  # as above
        raise UserError(f"model.architecture: cannot make a {config['_class_name']}: {one_line(error)}") from error


@dataclass(frozen=True)
class Sizes:
    """Sizes of a denoiser's inputs that its config leaves open.

    Attributes:
        tokens: length of the context; None is that of the published model.
        latents: (height, width) of the noisy sample; None is the config's `sample_size`, or Flux's 128 x 128.
    """

    tokens: int | None = None
    latents: tuple[int, int] | None = None

    def context(self, usual: int) -> int:
        """Length of the context."""
        return usual if self.tokens is None else self.tokens

    def packed(self) -> tuple[int, int]:
        """(rows, columns) of Flux's patches of 2 x 2 latents."""
        height, width = self.latents or (2 * FLUX_SIDE, 2 * FLUX_SIDE)
        return height // 2, width // 2


def example_samples(denoiser: nn.Module, batch: int, sizes: Sizes | None = None) -> Samples:
    """Noise in the shapes that a denoiser takes, on its device; all conditioning is zero.

    Args:
        denoiser: of a class that `CONDITIONING` lists, or an unconditional one.
        batch: number of samples B.
        sizes: sizes of the inputs. None takes those that the denoiser's graph was exported for, else the usual ones.
    """
    config: Any = denoiser.config
    device = next(denoiser.parameters()).device
    sizes = sizes or getattr(denoiser, "sizes", None) or Sizes()

    def empty(*shape: int) -> Tensor:
        return torch.zeros(batch, *shape, device=device)

    kind = type(denoiser).__name__
    arguments = CONDITIONING[kind](config, empty, sizes) if kind in CONDITIONING else {}
    if kind == "FluxTransformer2DModel":
        rows, columns = sizes.packed()
        shape: tuple[int, ...] = rows * columns, config.in_channels
    else:
        channels, *usual = sample_shape(denoiser)
        shape = channels, *(sizes.latents or usual)
    timesteps = torch.full_like(empty(), TIMESTEP)
    return Samples(torch.randn_like(empty(*shape)), timesteps, Conditioning.of_call(arguments, batch))


Empty = Callable[..., Tensor]


def _unet(config: Any, empty: Empty, _: Sizes) -> dict[str, Any]:
    known = config.get("num_class_embeds")
    return {"class_labels": empty().long()} if known else {}


def _conditional_unet(config: Any, empty: Empty, sizes: Sizes) -> dict[str, Any]:
    width = config.encoder_hid_dim or config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]  # one for each level, all of one context
    arguments: dict[str, Any] = {"encoder_hidden_states": empty(sizes.context(TEXT_TOKENS), width)}
    if config.num_class_embeds:
        arguments["class_labels"] = empty().long()
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {"text_embeds": empty(pooled), "time_ids": empty(TIME_IDS)}
    return arguments


def _dit(_: Any, empty: Empty, __: Sizes) -> dict[str, Any]:
    return {"class_labels": empty().long()}


def _pixart(config: Any, empty: Empty, sizes: Sizes) -> dict[str, Any]:
    sized = config.sample_size == 128 if config.use_additional_conditions is None else config.use_additional_conditions
    tokens = sizes.context(PIXART_TOKENS)
    return {
        "encoder_hidden_states": empty(tokens, config.caption_channels),
        "encoder_attention_mask": empty(tokens) + 1,
        "added_cond_kwargs": {"resolution": empty(2), "aspect_ratio": empty(1)} if sized else {},
    }


def _sd3(config: Any, empty: Empty, sizes: Sizes) -> dict[str, Any]:
    return {
        "encoder_hidden_states": empty(sizes.context(SD3_TOKENS), config.joint_attention_dim),
        "pooled_projections": empty(config.pooled_projection_dim),
    }


def _flux(config: Any, empty: Empty, sizes: Sizes) -> dict[str, Any]:
    tokens, (rows, columns) = sizes.context(FLUX_TOKENS), sizes.packed()
    positions = empty(rows * columns, 3)[0]
    numbers = torch.arange(rows * columns, device=positions.device)
    positions[:, 1], positions[:, 2] = numbers // columns, numbers % columns
    arguments: dict[str, Any] = {
        "encoder_hidden_states": empty(tokens, config.joint_attention_dim),
        "pooled_projections": empty(config.pooled_projection_dim),
        "txt_ids": empty(tokens, 3)[0],
        "img_ids": positions,
    }
    return arguments | ({"guidance": empty()} if config.guidance_embeds else {})


CONDITIONING: dict[str, Callable[[Any, Empty, Sizes], dict[str, Any]]] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _conditional_unet,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
"""What a denoiser takes beside x_t and t, by its class: from its config, a maker of zeros with B rows, and sizes."""
