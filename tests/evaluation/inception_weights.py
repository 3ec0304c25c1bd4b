"""Random weights for Inception v3, and pictures that its features tell apart."""

from __future__ import annotations

import torch
from torch import Tensor

from tcaq_lightning.evaluation.inception import Inception


def random_weights() -> dict[str, Tensor]:
    """The same tensors in every session, of a scale that keeps activations alive."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = Inception().state_dict()
    weights = {}
    for name, like in shapes.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
        elif name.endswith(("running_mean", "bias")):
            weights[name] = 0.1 * torch.randn(like.shape, generator=generator)
        elif like.ndim == 1:
            weights[name] = 0.5 + torch.rand(like.shape, generator=generator)
        else:
            scale = (2 / like[0].numel()) ** 0.5
            weights[name] = scale * torch.randn(like.shape, generator=generator)
    return weights


def pictures(count: int, size: int = 16, channels: int = 3, seed: int = 0) -> Tensor:
    """uint8 (count, channels, size, size): coloured noise at two scales."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 2, 2, generator=generator).repeat_interleave(size // 2, 2)
    coarse = coarse.repeat_interleave(size // 2, 3)
    fine = torch.rand(count, channels, size, size, generator=generator)
    return (255 * (0.7 * coarse + 0.3 * fine)).to(torch.uint8)
