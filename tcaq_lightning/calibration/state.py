"""What a calibration works on, and whom it tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from tcaq_lightning.calibration.initialize import Choices, Observations
from tcaq_lightning.calibration.run_dir import Run
from tcaq_lightning.calibration.storage import Tier
from tcaq_lightning.config import Config
from tcaq_lightning.models.sampling import Sampling
from tcaq_lightning.models.trajectories import Trajectories
from tcaq_lightning.models.units import UnitGraph
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups


class Listener(Protocol):
    """What the loop tells the outside; callbacks implement it."""

    def unit_started(self, round_index: int, position: int, name: str) -> None:
        """A unit is about to be loaded."""

    def unit_initialized(self, tag: str, unit: nn.Module, observed: Observations, choices: Choices) -> None:
        """A unit's quantizers are set, in round 0."""

    def unit_finished(self, round_index: int, position: int, record: dict[str, Any]) -> None:
        """A unit is in its final state of the round, or was restored to it."""

    def round_finished(self, round_index: int, record: dict[str, Any], samples: Trajectories) -> None:
        """A round's mismatch is measured; `samples` are the quantized sampler's held-out trajectories."""


@dataclass
class Calibration:
    """Everything the loop works on.

    Attributes:
        full, quantized: denoisers, the second with quantized layers.
        sampling: how the pipeline is sampled.
        graph: units in execution order.
        context: timestep groups of the quantized denoiser.
        limits: bytes of stored activations by tier.
        trajectories: full-precision trajectories; those after the first `num_trajectories` are held out.
        observers: Lightning callbacks of observation passes. learners: of fits.
        listener: told what happens.
        logger: shared TensorBoard logger, or None.
        records: of the units, in the order in which they were finished.
        sensitivities: by unit, (G, C) weights of its squared output error; empty weighs all alike.
    """

    config: Config
    run: Run
    full: nn.Module
    quantized: nn.Module
    sampling: Sampling
    graph: UnitGraph
    context: TimestepGroups
    limits: dict[Tier, float]
    trajectories: Trajectories
    listener: Listener
    observers: Sequence[pl.Callback] = ()
    learners: Sequence[pl.Callback] = ()
    logger: Logger | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    sensitivities: dict[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the denoisers are."""
        return next(self.full.parameters()).device

    @property
    def batch_size(self) -> int:
        """Samples per pass outside of the optimisation."""
        return self.config.calibration.batch_size

    @property
    def held_out(self) -> Trajectories:
        """Full-precision trajectories of the held-out noises, for the mismatch."""
        return self.trajectories.select(slice(self.config.calibration.num_trajectories, None))


def seconds_by_stage(records: list[dict[str, Any]], rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of a whole calibration by stage, over all commands that took part in it."""
    total: dict[str, float] = {}
    for record in records:
        for stage, seconds in record["seconds"].items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total | {"mismatch": sum(r["seconds"] for r in rounds)}
