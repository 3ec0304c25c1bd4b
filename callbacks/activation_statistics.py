"""Per-timestep, per-channel ranges of every activation that a unit quantizes, before and after TCR."""

from __future__ import annotations

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from tcaq_lightning.calibration.callback import CalibrationCallback
from tcaq_lightning.calibration.initialize import Choices, Observations
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.nn.parts import quantizers
from tcaq_lightning.reports.range_heat_maps import range_heat_maps


class ActivationStatistics(CalibrationCallback):
    """Draw the ranges that calibration has observed, what TCR made of them, and the errors it chose by.

    Args:
        writer: the run's event writer.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer

    def on_unit_initialized(self, visit: Visit, unit: nn.Module, observed: Observations, choices: Choices) -> None:
        """Draw each quantizer's ranges before and after the shift and the division by r."""
        modules = quantizers(unit)
        for name, ranges in observed.ranges.items():
            module = modules[name]
            if module.place == "input" and module.r.numel() > 1:
                centred = ranges if module.shift is None else ranges.shifted(module.shift.cpu())
                after = centred.magnitude() / module.r.cpu()  # (G, C)
                figure = range_heat_maps(ranges.magnitude(), after, f"{visit.tag} {name}")
                self.writer.add_figure(f"ranges/{visit.tag}/{name}", figure)
                self.writer.add_histogram(f"r/{visit.tag}/{name}", module.r)
        for name, errors in choices.reparameterization.items():
            for label, value in zip(("r_1", "r_chosen"), errors, strict=True):
                self.writer.add_scalar(f"tcr_output_error/{visit.tag}/{name}/{label}", value)
