"""Families of denoisers: which modules are reconstructed as one block, and what each layer is for.

A family is one class, registered under the name of the denoiser's class; subclasses of that denoiser belong to it too.
A denoiser of no registered family is described by `GenericFamily`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock
from torch import nn

from tcaq_lightning.config import Role
from tcaq_lightning.runtime.registry import Registry

LAYERS_WITH_WEIGHTS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Layers whose products are quantized."""
GATED_NORMS = ("ada_norm_zero", "ada_norm_single")
"""Norms of a `BasicTransformerBlock` that multiply its branches by a gate, which depends on the condition."""

OutputLayer = str | Callable[[Any], str | None] | None
"""The layer whose output is added to the block's output: its name within the block, or a function of the block that
returns the name. None where there is no such layer, as behind a gate."""


def _feed_forward(block: Any) -> str | None:
    return None if block.norm_type in GATED_NORMS else "ff.net.2"


def _time_embedding(block: Any) -> str | None:
    return "linear_2" if block.post_act is None else None


BLOCKS: Mapping[type[nn.Module], OutputLayer] = {
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
"""Blocks of diffusers' denoisers, each with its output layer."""


class Family:
    """What calibration must know of one kind of denoiser.

    A subclass sets what differs. A denoiser in a file of its own, outside of this package:

    >>> class Stage(nn.Module): ...
    >>> @FAMILIES.register("SmallDenoiser")
    ... class SmallFamily(Family):
    ...     blocks = {Stage: "fc2"}
    ...     roles = {"input": ("stem",), "output": ("head",), "time": ("clock.*", "*.to_time")}
    >>> class SmallDenoiser(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.stem, self.head = nn.Linear(2, 4), nn.Linear(4, 2)
    >>> family_of(SmallDenoiser()).roles_of(SmallDenoiser())
    {'stem': 'input', 'head': 'output'}

    Attributes:
        blocks: modules that are reconstructed whole (BRECQ, Li et al. 2021; `docs/method.md`, "Units and order"), each
            with its output layer: a shift of that layer's bias shifts the block's output by as much, divided by the
            block's own rescaling. The classes that a denoiser lists in `_repeated_blocks` are blocks too.
        roles: for each role, shell-style patterns on the names of layers within the denoiser. A layer has the first
            role that matches; one that matches none is a `block` layer.
    """

    blocks: ClassVar[Mapping[type[nn.Module], OutputLayer]] = BLOCKS
    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {}

    def is_block(self, denoiser: nn.Module, module: nn.Module) -> bool:
        """Whether a module of the denoiser is reconstructed whole."""
        repeated = getattr(denoiser, "_repeated_blocks", None) or ()
        return isinstance(module, tuple(self.blocks)) or type(module).__name__ in repeated or is_attention(module)

    def roles_of(self, denoiser: nn.Module) -> dict[str, Role]:
        """The role of every module that has parameters of its own, by its name."""
        names = (n for n, m in denoiser.named_modules() if any(True for _ in m.parameters(recurse=False)))
        return {name: self._role(name) for name in names}

    def _role(self, name: str) -> Role:
        matching = (role for role, patterns in self.roles.items() if any(fnmatchcase(name, p) for p in patterns))
        return next(matching, "block")


FAMILIES: Registry[type[Family]] = Registry("denoiser family")
"""Families by the name of the denoiser's class."""


class GenericFamily(Family):
    """Any other denoiser: roles from the names that diffusers gives to layers, and from where layers stand."""

    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {
        "time": (
            "time_embed*",
            "*time_emb_proj",
            "*timestep_embedder.*",
            "*time_text_embed.*",
            "t_embedder.*",
            "*.emb.*",
            "add_embedding.*",
        ),
        "modulation": ("*norm*.linear", "*adaln*.linear", "*adaLN*.linear", "*modulation*", "proj_out_1"),
        "shortcut": ("*conv_shortcut", "*skip_linear", "*skip_proj"),
        "input": ("conv_in", "proj_in", "x_embedder*", "pos_embed.proj", "patch_embed*", "context_embedder*", "img_in"),
        "output": ("conv_out", "proj_out", "proj_out_2", "final_layer.linear"),
    }

    def roles_of(self, denoiser: nn.Module) -> dict[str, Role]:
        """As the names say; without such names, the first and the last layer that the denoiser holds itself."""
        roles = super().roles_of(denoiser)
        own = [n for n, m in denoiser.named_children() if isinstance(m, LAYERS_WITH_WEIGHTS) and roles[n] == "block"]
        if len(own) > 1:
            first, last = own[0], own[-1]
            if "input" not in roles.values():
                roles[first] = "input"
            if "output" not in roles.values():
                roles[last] = "output"
        return roles


@FAMILIES.register("UNet2DModel")
@FAMILIES.register("UNet2DConditionModel")
class UNetFamily(Family):
    """Convolutional UNets of DDPM, latent diffusion, Stable Diffusion and SDXL."""

    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {
        "input": ("conv_in",),
        "output": ("conv_out",),
        "time": ("time_embedding.*", "*.time_emb_proj", "add_embedding.*", "class_embedding.*"),
        "shortcut": ("*.conv_shortcut",),
    }


@FAMILIES.register("DiTTransformer2DModel")
class DiTFamily(Family):
    """DiT (Peebles and Xie 2023): each block embeds the timestep itself."""

    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {
        "input": ("pos_embed.proj",),
        "output": ("proj_out_2",),
        "time": ("*.norm1.emb.*",),
        "modulation": ("*.norm1.linear", "proj_out_1"),
    }


@FAMILIES.register("PixArtTransformer2DModel")
class PixArtFamily(Family):
    """PixArt (Chen et al. 2024): one modulation for all blocks."""

    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {
        "input": ("pos_embed.proj", "caption_projection.*"),
        "output": ("proj_out",),
        "time": ("adaln_single.emb.*",),
        "modulation": ("adaln_single.linear",),
    }


@FAMILIES.register("SD3Transformer2DModel")
class SD3Family(Family):
    """Stable Diffusion 3 and 3.5 (Esser et al. 2024): an image stream and a text stream."""

    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {
        "input": ("pos_embed.proj", "context_embedder"),
        "output": ("proj_out",),
        "time": ("time_text_embed.*",),
        "modulation": ("*.norm1.linear", "*.norm1_context.linear", "norm_out.linear"),
    }


@FAMILIES.register("FluxTransformer2DModel")
class FluxFamily(Family):
    """Flux: blocks of two streams, then blocks of one."""

    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {
        "input": ("x_embedder", "context_embedder"),
        "output": ("proj_out",),
        "time": ("time_text_embed.*",),
        "modulation": ("*.norm1.linear", "*.norm1_context.linear", "*.norm.linear", "norm_out.linear"),
    }


def family_of(denoiser: nn.Module) -> Family:
    """The family of a denoiser's class, or of the nearest of its parents that has one; else the generic one."""
    names = (kind.__name__ for kind in type(denoiser).__mro__)
    return next((FAMILIES[name]() for name in names if name in FAMILIES), GenericFamily())


def inner_output_layer(block: nn.Module) -> str | None:
    """Name within a block of its output layer, if there is one; any family may know the block."""
    for blocks in (BLOCKS, *(family.blocks for _, family in FAMILIES.items())):
        for kind, inner in blocks.items():
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
    named = re.search(r"Attention(\d?[dD]|Pool(ing)?)?$", type(module).__name__) is not None
    return named and not any(is_attention(inner) for inner in module.modules() if inner is not module)
