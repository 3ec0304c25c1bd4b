"""A picture of a distribution of attention probabilities and the tails that DAQ fits to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tcaq_lightning.methods.daq_tails import TailFit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_tail(counts: Tensor, edges: Tensor, fit: TailFit, title: str = "") -> Figure:
    """Draw one group's histogram as a density on log-log axes, with both fitted tails where the fit is reliable.

    Args:
        counts: (1 + bins,) integers, column 0 the underflow bin (not drawn, but part of the total).
        edges: (2 + bins,) `LogHistogram.edges`.
        fit: the group's fit.
        title: heading of the axes.

    Returns:
        A matplotlib figure, bound to no window: for `SummaryWriter.add_figure` or `savefig`.
    """
    from matplotlib.figure import Figure

    counts, edges = counts.cpu().double(), edges.cpu().double()
    density = counts[1:] / edges[1:].diff() / counts.sum().clamp_min(1)
    drawn = density > 0
    centres = (edges[1:-1] * edges[2:]).sqrt()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="post-softmax value", ylabel="density")
    axes.set_title(title, fontsize=8)  # a layer's name is long
    axes.plot(centres[drawn].numpy(), density[drawn].numpy(), ".", color="0.5", label="histogram")
    if fit.reliable:
        x = torch.logspace(float(torch.tensor(fit.xmin).log10()), 0, 200, dtype=torch.float64).clamp(fit.xmin, 1.0)
        power_law, exponential = fit.tail_share * fit.power_law_density(x), fit.tail_share * fit.exponential_density(x)
        axes.plot(x.numpy(), power_law.numpy(), label=rf"power law, $\alpha$ = {fit.alpha:.3g}")
        axes.plot(x.numpy(), exponential.numpy(), "--", label=rf"exponential, $\lambda$ = {fit.rate:.3g}")
        axes.axvline(fit.xmin, color="0.8", linewidth=1)
        # An exponential far from the data falls by hundreds of decades: the data set the axis.
        axes.set_ylim(float(density[drawn].min()) / 3, float(density[drawn].max()) * 3)
    verdict = f"R = {fit.R:.3g}, p = {fit.p_value:.2g}: {fit.kind}" if fit.reliable else "no tail to fit: uniform"
    axes.legend(title=verdict)
    return figure
