"""Denoisers that no class of diffusers expresses: a UNet of published checkpoints, and those of a user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers import ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention

from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.registry import Registry

__all__ = ["DENOISERS", "FixedHeadsUNet2DModel", "denoiser_class", "found_in"]

DENOISERS: Registry[Any] = Registry("denoiser")
"""Denoisers that a config.json may name beside those of diffusers: subclasses of diffusers' `ModelMixin`, by their own
name."""


@DENOISERS.register("FixedHeadsUNet2DModel")
class FixedHeadsUNet2DModel(UNet2DModel):
    """A `UNet2DModel` whose attentions all have the same number of heads, whatever their channels.

    Latent diffusion's network for LSUN-Churches is one: 8 heads on 192, 384 and 768 channels. `UNet2DModel` knows only
    one number of channels a head for all attentions. All arguments but the last are those of `UNet2DModel`.

    Args:
        num_attention_heads: heads of every attention; divides the channels of each.

    Raises:
        ValueError: the heads do not divide an attention's channels.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self: Any,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types: tuple[str, ...] = ("UpBlock2D", "AttnUpBlock2D"),
        block_out_channels: tuple[int, ...] = (192, 384),
        layers_per_block: int = 2,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        attn_norm_num_groups: int | None = None,
        resnet_time_scale_shift: str = "default",
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        num_attention_heads: int = 8,
    ) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            attn_norm_num_groups=attn_norm_num_groups,
            resnet_time_scale_shift=resnet_time_scale_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            freq_shift=freq_shift,
            attention_head_dim=None,  # one head each, so that every width passes
        )
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                if module.inner_dim % num_attention_heads:
                    raise ValueError(
                        f"num_attention_heads must divide the channels of {name}, {module.inner_dim}, "
                        f"got {num_attention_heads}"
                    )
                module.heads = num_attention_heads
                module.scale = (module.inner_dim // num_attention_heads) ** -0.5


def denoiser_class(name: str, where: str = "") -> Any:
    """A denoiser's class by its name, of diffusers or of `DENOISERS`.

    Args:
        name: of the class.
        where: the file that names it, for the message.

    Raises:
        UserError: neither has it.

    >>> denoiser_class("UNet2DModel").__name__
    'UNet2DModel'
    """
    found = DENOISERS[name] if name in DENOISERS else getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        raise UserError(
            f"{where}: the denoiser is a {name}, which diffusers {diffusers.__version__} lacks; expected a class of "
            "diffusers, or one that a module in `extensions` registers as denoiser"
        )
    return found


@contextmanager
def found_in(library: object, denoiser: Any) -> Iterator[None]:
    """Let diffusers find a user's own class where a model_index.json says that it is, whatever its module is called.

    Args:
        library: module of the denoiser's class, as the index names it.
        denoiser: of that class.
    """
    own = type(denoiser).__name__ in DENOISERS and isinstance(library, str) and library not in sys.modules
    if own:
        sys.modules[str(library)] = sys.modules[type(denoiser).__module__]
    try:
        yield
    finally:
        if own:
            del sys.modules[str(library)]
