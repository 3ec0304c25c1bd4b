"""What calibration tells the callbacks that are handed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import nn

from tcaq_lightning.calibration.initialize import Choices, Observations
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.models.trajectories import Trajectories


class CalibrationCallback(pl.Callback):
    """A Lightning callback of each unit's observation and fits that is told about units and rounds as well.

    Its hooks do nothing until a subclass says what.
    """

    def on_unit_start(self, visit: Visit) -> None:
        """A unit is about to be loaded."""

    def on_unit_initialized(self, visit: Visit, unit: nn.Module, observed: Observations, choices: Choices) -> None:
        """A unit's quantizers are set, in round 0.

        Args:
            visit: which unit.
            unit: quantized.
            observed: statistics of its inputs.
            choices: what was set.
        """

    def on_unit_end(self, visit: Visit, record: dict[str, Any]) -> None:
        """A unit is in its final state of the round, or was restored to it.

        Args:
            visit: which unit.
            record: held-out errors `before` and `after`, `kept`, and what else metrics.json has of the unit.
        """

    def on_round_end(self, round_index: int, record: dict[str, Any], samples: Trajectories) -> None:
        """The mismatch after a round is measured.

        Args:
            round_index: of the round.
            record: `mismatch` by timestep, `mean_mismatch`, `kept`.
            samples: the quantized sampler's held-out trajectories.
        """


def listeners(callbacks: Sequence[pl.Callback]) -> list[CalibrationCallback]:
    """Those of the callbacks that are told about units and rounds."""
    return [callback for callback in callbacks if isinstance(callback, CalibrationCallback)]
