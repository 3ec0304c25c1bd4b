"""TCR: timestep-channel joint reparameterization (docs/method.md, "TCR").

X' = X / r and W'[:, d] = W[:, d] r_d leave a full-precision layer unchanged and give all channels of X' ranges that one
step can serve (TCAQ-DM, Huang et al., AAAI 2025, arXiv:2412.16700).

Where r is chosen: `TCR.candidates` turns per-timestep, per-channel ranges into the grid that is searched, and
`reparameterization.choose` takes from it the r of least output error with input and weight quantized. In round 0's r
phase log r is then learned. `PublishedTCR` is the paper's formula alone, for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tcaq_lightning.methods.reparameterization import REPARAMETERIZATIONS, Reparameterization, normalized
from tcaq_lightning.quantizers.observers import RangeStatistics


def channel_profile(magnitude: Tensor, target: Tensor) -> Tensor:
    """Timestep-weighted profile of the channels' ranges.

    r^t_d = max|X^t_d| / s^t,  r_d = sum_t r^t_d max|X^t_d| / sum_t max|X^t_d|: timesteps with larger activations weigh
    more   (TCAQ-DM, Huang et al. 2025, section 3.2; docs/method.md, "TCR")

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

    Returns:
        (C,).
    """
    positive = torch.where(magnitude > 0, magnitude, torch.inf).amin(1)
    target = torch.where(positive.isfinite(), positive, torch.ones_like(positive))
    return channel_profile(magnitude, target).clamp(1, truncation)


def candidates(
    magnitude: Tensor,
    weight_magnitude: Tensor,
    truncation: float = 10.0,
    exponents: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
) -> Tensor:
    """The grid that r is searched in: 1, p^a and p^a / max|W_d|^(1-a), for several targets of the profile p.

    Args:
        magnitude: (T, C) of the layer's input.
        weight_magnitude: (C,) largest magnitude of the weights that meet each channel.
        truncation: R_trunc.
        exponents: values of a.

    Returns:
        (K, C) with distinct rows, the first all ones: TCR never starts worse than nothing.
    """
    floor = magnitude[magnitude > 0].min() if (magnitude > 0).any() else magnitude.new_ones(())
    positive = magnitude.clamp(min=floor)
    weights = weight_magnitude.clamp(min=weight_magnitude.max().clamp(min=1e-12) * 1e-4)
    rows = [torch.ones_like(weights)]
    for target in (positive.amin(1), positive.quantile(0.25, dim=1), positive.mean(1)):
        profile = channel_profile(positive, target)
        for a in exponents:
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


@REPARAMETERIZATIONS.register("searched")
class TCR(Reparameterization):
    """The candidate of least output error, among powers of the timestep-weighted profile.

    Where all layers that read the input are pointwise, every channel may also be shifted to the centre of its range
    (channel shifting, Outlier Suppression+, Wei et al. 2023).
    """

    def shifts(self, ranges: RangeStatistics) -> list[Tensor]:
        """The centre of each channel's range, as float16 holds it."""
        return [ranges.centre().half()]

    def candidates(self, ranges: RangeStatistics, weights: Tensor) -> Tensor:
        """(K, C), the first row all ones."""
        return candidates(ranges.magnitude(), weights, self.truncation, self.config.exponents)


@REPARAMETERIZATIONS.register("profile")
class PublishedTCR(Reparameterization):
    """The published timestep-weighted formula, taken as it is."""

    def candidates(self, ranges: RangeStatistics, weights: Tensor) -> Tensor:
        """(1, C)."""
        return published_r(ranges.magnitude(), self.truncation)[None]
