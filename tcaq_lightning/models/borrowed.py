"""Leaving a caller's pipeline as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.utils import logging as diffusers_logging
from torch import nn


@contextmanager
def borrowed(pipeline: Any) -> Iterator[None]:
    """Put back afterwards where a pipeline's networks are, whether they train, and what of them takes gradients.

    Whether diffusers shows progress bars is put back too, for this pipeline and in general.

    Args:
        pipeline: a diffusers pipeline.
    """
    networks = [x for x in getattr(pipeline, "components", {}).values() if isinstance(x, nn.Module)]
    devices = [next((p.device for p in network.parameters()), None) for network in networks]
    training = [(module, module.training) for network in networks for module in network.modules()]
    gradients = [(p, p.requires_grad) for network in networks for p in network.parameters()]
    shown, bars = diffusers_logging.is_progress_bar_enabled(), getattr(pipeline, "_progress_bar_config", None)
    try:
        yield
    finally:
        for network, device in zip(networks, devices, strict=True):
            if device is not None:
                network.to(device)
        for module, flag in training:
            module.training = flag
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
        if shown:
            diffusers_logging.enable_progress_bar()
        if bars is None:
            vars(pipeline).pop("_progress_bar_config", None)
        else:
            pipeline._progress_bar_config = bars
