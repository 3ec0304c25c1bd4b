from __future__ import annotations

import io
import warnings

import torch

from tcaq_lightning.methods.daq import decide_by_likelihood
from tcaq_lightning.quantizers.observers import LogHistogram
from tcaq_lightning.reports.tail_plot import plot_tail


def power_law_histogram(groups: int = 2, size: int = 20_000) -> LogHistogram:
    """Exponent 1.5 on [1e-3, 1]."""
    u = torch.rand(groups, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    histogram = LogHistogram(groups)
    histogram.update((1e-3**-0.5 + u * (1 - 1e-3**-0.5)) ** -2, torch.arange(groups))
    return histogram


def test_plot_shows_the_histogram_and_both_tails_through_its_mass() -> None:
    histogram = power_law_histogram()
    fit = decide_by_likelihood(histogram)[0]
    figure = plot_tail(histogram.counts[0], histogram.edges, fit, "mid_block, group 0")
    (axes,) = figure.axes
    assert axes.get_title() == "mid_block, group 0"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.lines[0].get_label() == "histogram"
    drawn = torch.from_numpy(axes.lines[0].get_xydata())
    inside = drawn[(drawn[:, 0] > 2 * fit.xmin) & (drawn[:, 0] < 0.3)]
    model = fit.tail_share * fit.power_law_density(inside[:, 0])
    assert (inside[:, 1] / model).log().abs().mean() < 0.1
    figure.savefig(io.BytesIO(), format="png")


def test_plot_of_groups_without_a_tail_draws_without_warnings() -> None:
    histogram = LogHistogram(2)
    histogram.update(torch.ones(1, 100), torch.tensor([1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for group, fit in enumerate(decide_by_likelihood(histogram)):
            figure = plot_tail(histogram.counts[group], histogram.edges, fit)
            figure.savefig(io.BytesIO(), format="png")
            assert "no tail" in figure.axes[0].get_legend().get_title().get_text()
