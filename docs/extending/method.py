"""A reparameterization of one's own: SmoothQuant by what a channel's range typically is, not by its outliers."""

from __future__ import annotations

import torch
from torch import Tensor

from tcaq_lightning.methods.reparameterization import REPARAMETERIZATIONS, Reparameterization, normalized
from tcaq_lightning.quantizers.observers import RangeStatistics


@REPARAMETERIZATIONS.register("clipped_smoothquant")
class ClippedSmoothQuant(Reparameterization):
    """r_d = median_g max|X^g_d|^a / max|W_d|^(1 - a), for three a and beside r = 1; the search takes the best."""

    def candidates(self, ranges: RangeStatistics, weights: Tensor) -> Tensor:
        """(4, C)."""
        typical = ranges.magnitude().median(dim=0).values.clamp(min=1e-5)  # (G, C) -> (C,)
        rows = [typical**a / weights.clamp(min=1e-5) ** (1 - a) for a in (0.3, 0.5, 0.7)]
        return normalized(torch.stack([torch.ones_like(weights), *rows]), self.truncation)
