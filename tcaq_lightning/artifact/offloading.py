"""Offloading of an artifact's denoiser: what diffusers and accelerate do with tensors that several layers share."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.parts import quant_layers


class OffloadedLayers:
    """Methods of a denoiser whose layers may be offloaded one by one."""

    def enable_group_offload(self: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers does it.

        Layers that read one tensor share its quantizer. Where each layer is a group of its own, and a group's tensors
        are replaced by those of a file or a stream, they get one each: the same bits, computed anew in each layer.
        """
        enable = super().enable_group_offload  # type: ignore[misc]
        given = inspect.signature(enable).bind(*args, **kwargs).arguments
        if given.get("use_stream") or given.get("offload_to_disk_path"):
            _separate_quantizers(self)
        enable(*args, **kwargs)


def _separate_quantizers(denoiser: nn.Module) -> None:
    """Give every layer an input quantizer of its own."""
    seen: set[int] = set()
    for layer in quant_layers(denoiser).values():
        quantizer = layer.input_quantizer
        if id(quantizer) in seen:
            layer.input_quantizer = copy.deepcopy(quantizer, {id(quantizer.groups): quantizer.groups})
        seen.add(id(quantizer))


def check_at_hand(denoiser: nn.Module) -> None:
    """Check that a denoiser's tensors are in memory, to be saved.

    Raises:
        UserError: they are offloaded to a file, or to where nobody but their own layer finds them.
    """
    registries = (module.__dict__.get("_diffusers_hook") for module in denoiser.modules())
    groups = (getattr(hook, "group", None) for r in registries if r is not None for hook in r.hooks.values())
    on_disk = any(getattr(group, "offload_to_disk_path", None) for group in groups)
    if on_disk or any(tensor.is_meta for tensor in (*denoiser.parameters(), *denoiser.buffers())):
        raise UserError("save_pretrained: the denoiser is offloaded; open the artifact again and save it before")
