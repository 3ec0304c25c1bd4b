"""TCR: timestep-channel joint reparameterization (METHOD section 3).

X' = X / r and W'[:, d] = W[:, d] r_d leave a full-precision layer unchanged and give all channels of X' ranges that one
step can serve. The pure functions here turn per-timestep, per-channel ranges into r.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXPONENTS = (0.25, 0.5, 0.75, 1.0)
"""a in p^a and p^a / max|W|^(1-a)."""


def channel_profile(magnitude: Tensor, target: Tensor) -> Tensor:
    """Timestep-weighted profile of the channels' ranges.

    r^t_d = max|X^t_d| / s^t,  r_d = sum_t r^t_d max|X^t_d| / sum_t max|X^t_d|: timesteps with larger activations weigh
    more   (TCAQ-DM, Huang et al. 2025, section 3.2, as read in METHOD section 3)

    Args:
        magnitude: (T, C) largest magnitude of each channel at each timestep (or in each group).
        target: (T,) target range s^t, positive.

    Returns:
        (C,), positive; 1 for channels that are always zero.

    >>> channel_profile(torch.tensor([[1.0, 2.0], [1.0, 6.0]]), torch.tensor([1.0, 1.0]))
    tensor([1., 5.])
    """
    relative = magnitude / target[:, None]
    total = magnitude.sum(0)
    return torch.where(total > 0, (relative * magnitude).sum(0) / total.clamp(min=1e-30), torch.ones_like(total))


def published_r(magnitude: Tensor, truncation: float = 10.0) -> Tensor:
    """r as published: target min_d max|X_d|, clipped to [1, R_trunc].

    Args:
        magnitude: (T, C) as in `channel_profile`.
        truncation: R_trunc.
    """
    positive = torch.where(magnitude > 0, magnitude, torch.inf).amin(1)
    target = torch.where(positive.isfinite(), positive, torch.ones_like(positive))
    return channel_profile(magnitude, target).clamp(1, truncation)


def normalized(r: Tensor, truncation: float) -> Tensor:
    """Scale r to geometric mean 1 over its last axis, then clip to [1 / truncation, truncation].

    >>> normalized(torch.tensor([1.0, 4.0]), truncation=10.0)
    tensor([0.5000, 2.0000])
    """
    log_r = r.clamp(min=1e-12).log()
    return (log_r - log_r.mean(-1, keepdim=True)).exp().clamp(1 / truncation, truncation)


def candidates(magnitude: Tensor, weight_magnitude: Tensor, truncation: float = 10.0) -> Tensor:
    """The grid that r is searched in: 1, p^a and p^a / max|W_d|^(1-a), for several targets of the profile p.

    Args:
        magnitude: (T, C) of the layer's input.
        weight_magnitude: (C,) largest magnitude of the weights that meet each channel.
        truncation: R_trunc.

    Returns:
        (K, C) with distinct rows, the first all ones: TCR never starts worse than nothing.
    """
    floor = magnitude[magnitude > 0].min() if (magnitude > 0).any() else magnitude.new_ones(())
    positive = magnitude.clamp(min=floor)
    weights = weight_magnitude.clamp(min=weight_magnitude.max().clamp(min=1e-12) * 1e-4)
    rows = [torch.ones_like(weights)]
    for target in (positive.amin(1), positive.quantile(0.25, dim=1), positive.mean(1)):
        profile = channel_profile(positive, target)
        for a in EXPONENTS:
            rows.append(profile**a)
            if a < 1:
                rows.append(profile**a / weights ** (1 - a))
    grid = normalized(torch.stack(rows), truncation)
    return _distinct(grid)


def _distinct(grid: Tensor, tolerance: float = 0.02) -> Tensor:
    """Rows that differ from every earlier kept row by more than `tolerance` in some log ratio."""
    kept: list[Tensor] = []
    for row in grid:
        if all((row.log() - other.log()).abs().max() > tolerance for other in kept):
            kept.append(row)
    return torch.stack(kept)
