"""What a calibration works on, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.callback import CalibrationCallback
from tcaq_lightning.calibration.run_dir import Run
from tcaq_lightning.calibration.storage import Tier
from tcaq_lightning.config import Config
from tcaq_lightning.models.sampling import Sampling
from tcaq_lightning.models.trajectories import Trajectories
from tcaq_lightning.models.units import UnitGraph
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups


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
        callbacks: Lightning callbacks of observation passes and fits.
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
    callbacks: Sequence[pl.Callback] = ()
    records: list[dict[str, Any]] = field(default_factory=list)
    sensitivities: dict[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the denoisers are."""
        return next(self.full.parameters()).device

    @property
    def listeners(self) -> list[CalibrationCallback]:
        """The callbacks that are told about units and rounds."""
        return [callback for callback in self.callbacks if isinstance(callback, CalibrationCallback)]

    @property
    def batch_size(self) -> int:
        """Samples per pass outside of the optimisation."""
        return self.config.calibration.batch_size

    @property
    def held_out(self) -> Trajectories:
        """Full-precision trajectories of the held-out noises, for the mismatch."""
        return self.trajectories.select(slice(self.config.calibration.num_trajectories, None))


@dataclass(frozen=True)
class Calibrated:
    """What a calibration has done.

    Attributes:
        units: a record for each round and unit, in the order in which they were finished.
        rounds: a record for each round: mismatch by step on held-out noise, whether the round was kept, seconds.
    """

    units: list[dict[str, Any]]
    rounds: list[dict[str, Any]]

    def seconds(self) -> dict[str, float]:
        """Seconds of the whole calibration by stage, over all commands that took part in it."""
        total: dict[str, float] = {}
        for record in self.units:
            for stage, seconds in record["seconds"].items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total | {"mismatch": sum(r["seconds"] for r in self.rounds)}
