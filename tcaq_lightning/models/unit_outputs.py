"""What a unit returns: its tensors, their channels and means over them, and the rows of a sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

Outputs = Any
"""What a unit returns: a tensor, or several in a tuple or another tree, whose other leaves are constants."""


def output_tensors(outputs: Outputs) -> list[Tensor]:
    """The tensors of what a unit returns."""
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]


def channel_count(shape: tuple[int, ...]) -> int:
    """C of (C,), (T, C), (C, H, W) or (k, C, H, W), an output's shape without the batch axis."""
    return shape[-3 if len(shape) > 2 else -1]


def by_sample(x: Tensor, batch: int) -> Tensor:
    """(B, ...) as it is, (k B, ...) as (B, k, ...)."""
    return x if x.shape[0] == batch else x.reshape(batch, -1, *x.shape[1:])


WITHIN_CHANNELS = {2: (), 3: (1,), 4: (2, 3), 5: (1, 3, 4)}
"""Axes of (B, C), (B, T, C), (B, C, H, W) and (B, k, C, H, W) that are neither samples nor channels."""


def channel_means(x: Tensor) -> Tensor:
    """Means of each sample's channels: (B, C, H, W), (B, k, C, H, W), (B, T, C) or (B, C) -> (B, C)."""
    axes = WITHIN_CHANNELS[x.ndim]
    return x.mean(axes) if axes else x


def mean_squares(x: Tensor) -> Tensor:
    """Means of the squares of each sample's channels; shapes as in `channel_means`."""
    return channel_means(x.square())


def beside_channels(values: Tensor, dims: int) -> Tensor:
    """(B, C) values beside a tensor of `dims` axes, as in `channel_means`."""
    for axis in WITHIN_CHANNELS[dims]:
        values = values.unsqueeze(axis)
    return values
