"""A picture of the ranges of a layer's input, by channel and timestep group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def range_heat_maps(before: Tensor, after: Tensor, title: str, size: tuple[float, float] = (7, 4)) -> Figure:
    """Largest magnitude of each channel in each timestep group, before and after shift and division by r.

    Args:
        before: (G, C) largest magnitudes of X.
        after: (G, C) largest magnitudes of (X - shift) / r.
        title: heading.
        size: width and height in inches.
    """
    from matplotlib.figure import Figure

    before, after = before.clamp(min=1e-6).log10(), after.clamp(min=1e-6).log10()
    low, high = torch.quantile(torch.stack([before, after]), torch.tensor([0.01, 1.0])).tolist()
    figure = Figure(figsize=size)
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.13, top=0.85, hspace=0.9)  # a layout engine is far slower
    for axes, values, label in zip(
        figure.subplots(2, 1), (before, after), ("max |X|", "max |(X - shift) / r|"), strict=True
    ):
        image = axes.imshow(values.numpy(), aspect="auto", vmin=low, vmax=high, interpolation="nearest")
        axes.set(xlabel="channel", ylabel="timestep group", title=f"log10 {label}")
        figure.colorbar(image, ax=axes)
    figure.suptitle(title, fontsize=8)
    return figure
