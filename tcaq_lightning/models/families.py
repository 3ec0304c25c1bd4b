"""The registry of blocks: modules that are reconstructed whole (BRECQ, Li et al. 2021)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock
from torch import nn

GATED_NORMS = ("ada_norm_zero", "ada_norm_single")
"""Of a `BasicTransformerBlock`: its branches enter the stream times a gate that depends on the condition."""


def _feed_forward(block: Any) -> str | None:
    return None if block.norm_type in GATED_NORMS else "ff.net.2"


def _time_embedding(block: Any) -> str | None:
    return "linear_2" if block.post_act is None else None


BLOCKS: dict[type[nn.Module], str | Callable[[Any], str | None] | None] = {
    ResnetBlock2D: "conv2",
    ResnetBlockCondNorm2D: "conv2",
    Attention: "to_out.0",
    BasicTransformerBlock: _feed_forward,
    JointTransformerBlock: None,
    SD3SingleTransformerBlock: None,
    FluxTransformerBlock: None,
    FluxSingleTransformerBlock: None,
    TimestepEmbedding: _time_embedding,
    PixArtAlphaTextProjection: "linear_2",
}
"""Blocks, each with the layer whose output enters the block's output with factor 1 / (the block's rescaling): a shift
of that layer's bias shifts the block's output. None where there is no such layer, as behind a gate. Extend to add one;
of a denoiser that names its repeated blocks itself, as diffusers' transformers do, these are taken too."""


def repeated_blocks(denoiser: nn.Module) -> tuple[str, ...]:
    """Class names of the blocks that a diffusers denoiser says it consists of."""
    names: Any = getattr(denoiser, "_repeated_blocks", None)
    return tuple(names or ())


def inner_output_layer(block: nn.Module) -> str | None:
    """Name within a block of the layer that shifts its output, if there is one."""
    for kind, inner in BLOCKS.items():
        if isinstance(block, kind):
            return inner(block) if callable(inner) else inner
    return None


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention, known or not: it has a processor, or is called so and has no other within.

    >>> from diffusers.models.attention_processor import Attention
    >>> is_attention(Attention(query_dim=8, heads=1, dim_head=8)), is_attention(nn.Linear(8, 8))
    (True, False)
    """
    if hasattr(module, "processor") and hasattr(module, "set_processor"):
        return True
    named = re.search(r"Attention(Pool(ing)?)?$", type(module).__name__) is not None
    return named and not any(is_attention(inner) for inner in module.modules() if inner is not module)
