"""Distributions of post-softmax values, the fits of their tails, and what DAQ chose by them."""

from __future__ import annotations

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from tcaq_lightning.calibration.callback import CalibrationCallback
from tcaq_lightning.calibration.initialize import Choices, Observations
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.reports.tail_plot import plot_tail


class DistributionFitting(CalibrationCallback):
    """Draw the histograms that calibration has observed with their fits, and DAQ's choice in each timestep group.

    Args:
        writer: the run's event writer.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer

    def on_unit_initialized(self, visit: Visit, unit: nn.Module, observed: Observations, choices: Choices) -> None:
        """Log every group's figures, and draw the tails of the first and the last group."""
        for name, choice in choices.attention.items():
            tag = f"daq/{visit.tag}/{name}"
            for group, fit in enumerate(choice.fits):
                self.writer.add_scalar(f"{tag}/likelihood_ratio", fit.R, group)
                for label, values in (
                    ("logarithmic", choice.logarithmic),
                    ("uniform_error", choice.uniform_error),
                    ("log_error", choice.log_error),
                ):
                    self.writer.add_scalar(f"{tag}/{label}", float(values[group]), group)
            histogram = observed.histograms[name]
            for group in sorted({0, len(choice.fits) - 1}):
                title = f"{visit.tag} {name}, group {group}"
                figure = plot_tail(histogram.counts[group], histogram.edges, choice.fits[group], title)
                self.writer.add_figure(tag, figure, group)
