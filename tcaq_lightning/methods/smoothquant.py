"""SmoothQuant: balance the largest magnitudes of activations and weights (docs/method.md, "TCR").

Not used unless `tcr.formula` names it. Per layer it stands behind TCR's search, which has r of this form among its
candidates.
"""

from __future__ import annotations

from torch import Tensor

from tcaq_lightning.methods.reparameterization import REPARAMETERIZATIONS, Reparameterization, normalized
from tcaq_lightning.quantizers.observers import RangeStatistics

SMALLEST = 1e-5
"""Magnitudes below are raised to it, as in the published code: it only keeps a dead channel from a division by zero."""


def smoothing_factors(activations: Tensor, weights: Tensor, alpha: float = 0.5) -> Tensor:
    """r_d = max|X_d|^alpha / max|W_d|^(1 - alpha)   (SmoothQuant, Xiao et al., ICML 2023, eq. 4).

    Args:
        activations: (C,) largest magnitude of each channel.
        weights: (C,) largest magnitude of the weights that meet it.
        alpha: how much of the difficulty moves to the weights, in [0, 1].

    Returns:
        (C,), positive.

    >>> import torch
    >>> smoothing_factors(torch.tensor([1.0, 16.0]), torch.tensor([1.0, 4.0]))
    tensor([1., 2.])
    """
    activations, weights = activations.clamp(min=SMALLEST), weights.clamp(min=SMALLEST)
    return activations**alpha / weights ** (1 - alpha)


@REPARAMETERIZATIONS.register("smoothquant")
class SmoothQuant(Reparameterization):
    """One r for all timesteps, from each channel's largest magnitude over them, with geometric mean 1."""

    def candidates(self, ranges: RangeStatistics, weights: Tensor) -> Tensor:
        """(1, C): the formula is taken as it is."""
        largest = ranges.magnitude().amax(0)  # (G, C) -> (C,)
        return normalized(smoothing_factors(largest, weights, self.config.alpha), self.truncation)[None]
