"""What a calibration works on, which never changes while it runs, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from tcaq_lightning.calibration.run_files import RunFiles
from tcaq_lightning.calibration.storage import Tier
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.config import Config
from tcaq_lightning.models.graph import UnitGraph
from tcaq_lightning.models.sampling import Sampling
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups

Record: TypeAlias = dict[str, Any]
"""JSON-ready values by name."""


@dataclass(frozen=True)
class Setup:
    """What all steps of a calibration share.

    Attributes:
        config: the run's configuration.
        full: full-precision denoiser.
        quantized: its twin with quantized layers.
        sampling: how the pipeline is sampled.
        graph: units in execution order.
        timestep_groups: timestep groups of the quantized denoiser.
        limits: bytes of stored activations by tier.
        files: where the run keeps its files.
    """

    config: Config
    full: nn.Module
    quantized: nn.Module
    sampling: Sampling
    graph: UnitGraph
    timestep_groups: TimestepGroups
    limits: dict[Tier, float]
    files: RunFiles

    @property
    def device(self) -> torch.device:
        """Where the denoisers are."""
        return next(self.full.parameters()).device

    def visits(self, round_index: int, start: int | None = None) -> list[Visit]:
        """The units' turns in a round, in execution order.

        Args:
            round_index: of the round.
            start: the round whose result it starts from; None in the first.
        """
        return [Visit(round_index, position, name, start) for position, name in enumerate(self.graph.names)]

    def unit(self, visit: Visit) -> nn.Module:
        """The quantized unit."""
        return self.quantized.get_submodule(visit.name)


@dataclass(frozen=True)
class Calibrated:
    """What a calibration has done.

    Attributes:
        units: a record for each round and unit, in the order in which they were finished.
        rounds: a record for each round: mismatch by step on held-out noise, whether the round was kept, seconds.
    """

    units: list[Record]
    rounds: list[Record]

    def seconds(self) -> dict[str, float]:
        """Seconds of the whole calibration by stage, over all commands that took part in it."""
        total: dict[str, float] = {}
        for record in self.units:
            for stage, seconds in record["seconds"].items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total | {"mismatch": sum(r["seconds"] for r in self.rounds)}
