"""Fused projections of diffusers' attentions, and how they are taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models import attention_processor
from torch import nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.models.families import is_attention
from tcaq_lightning.nn.attention.processor import ADDED, PROCESSORS, SELF, processor_name

FUSED: dict[str, tuple[str, ...]] = {"to_qkv": SELF, "to_kv": SELF[1:], "to_added_qkv": ADDED}
"""Fused projections, and the ones that they stand for."""


def separate_all_projections(denoiser: nn.Module) -> dict[str, int]:
    """Undo diffusers' fusion of projections in all attentions of known processors, in place.

    Args:
        denoiser: full precision.

    Returns:
        Number of parameters of each fused layer that was removed, by name.

    Raises:
        UserError: as in `separate_projections`.
    """
    removed: dict[str, int] = {}
    for name, module in list(denoiser.named_modules()):
        if is_attention(module) and (kind := processor_name(module)) in PROCESSORS:
            removed |= separate_projections(module, name)
            if kind.startswith("Fused"):
                separate: Any = getattr(attention_processor, kind.removeprefix("Fused"))
                attention: Any = module
                attention.set_processor(separate())
    return removed


def separate_projections(attention: Any, name: str) -> dict[str, int]:
    """Undo diffusers' fusion of projections, in place, with the weights that the fused layers have now.

    q, k and v share their input's quantizer and have a scale for every output channel anyway: nothing is gained by one
    large layer, and a model that is opened again has separate ones.

    Args:
        attention: of a known processor.
        name: for the message.

    Returns:
        Number of parameters of each fused layer that was removed.

    Raises:
        UserError: the fused processor leaves out norms of q and k that the separate one would apply.
    """
    removed: dict[str, int] = {}
    kind = processor_name(attention)
    if kind == "FusedJointAttnProcessor2_0" and attention.norm_q is not None:
        raise UserError(
            f"attention {name} has norms of q and k, which its {kind} leaves out; expected separate projections: call "
            f"unfuse_qkv_projections() of the denoiser first"
        )
    used = kind.startswith("Fused") or (kind == "FluxAttnProcessor" and attention.fused_projections)
    for fused, parts in FUSED.items():
        layer = getattr(attention, fused, None)
        if layer is None:
            continue
        if used:
            _take_apart(layer, [attention.get_submodule(part) for part in parts])
        removed[f"{name}.{fused}"] = sum(p.numel() for p in layer.parameters())
        delattr(attention, fused)
    attention.fused_projections = False
    return removed


@torch.no_grad()
def _take_apart(fused: Any, parts: Sequence[Any]) -> None:
    """Give the parts parameters of their own: those that they have may be another denoiser's too."""
    sizes = [part.weight.shape[0] for part in parts]
    for kind in ("weight", "bias"):
        if getattr(fused, kind) is not None:
            for part, values in zip(parts, getattr(fused, kind).split(sizes), strict=True):
                requires_grad = getattr(part, kind).requires_grad
                setattr(part, kind, nn.Parameter(values.clone(), requires_grad=requires_grad))
