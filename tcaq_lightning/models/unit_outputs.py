"""What a unit returns: its tensors, their channels, and the rows of a sample."""

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
