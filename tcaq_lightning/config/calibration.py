"""The data that the model is calibrated on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from tcaq_lightning.config.checks import Section, require, require_count
from tcaq_lightning.config.sampler import SamplerConfig

MOST_GIGABYTES = 1e9
MOST_TRAJECTORIES = 400_000
"""Noises from this number on are those of the evaluation."""


@dataclass
class MemoryBudget(Section):
    """Gigabytes (10^9 bytes) for each process' stored activations; the device is filled first, then host, then disk."""

    device: float | None = None
    """In the memory of a GPU; null: half of what is free there. A CPU's memory counts as the host's."""
    host: float | None = None
    """In host memory; null: half of what is available, shared by a node's processes."""
    disk: float | None = None
    """In memory-mapped files in RUN_DIR; null: what is free there, shared by a node's processes."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        for name in ("device", "host", "disk"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < math.inf,
                f"calibration.memory_budget.{name}",
                "finite and at least 0, or null",
                value,
            )
            require(
                value is None or value <= MOST_GIGABYTES,
                f"calibration.memory_budget.{name}",
                f"at most {MOST_GIGABYTES:g} (gigabytes), or null",
                value,
            )


@dataclass
class CalibrationConfig(Section):
    """The model's own samples that it is calibrated on."""

    num_trajectories: int = 64
    """Trajectories to calibrate on; each gives one sample per sampler step."""
    held_out_trajectories: int = 8
    """Further trajectories, for the held-out losses and the gate."""
    mismatch_trajectories: int = 32
    """Trajectories, after the first num_trajectories, on which the mismatch of the two samplers is measured."""
    batch_size: int = 64
    """Samples per forward pass outside of the optimisation."""
    observed_samples: int = 640
    """Approximate number of samples that a unit's ranges and distributions are taken from; each has many pixels."""
    probe_samples: int = 40
    """Samples that the searches of ranges, r and quantizers use, spread evenly over the timestep groups."""
    probe_queries: int = 256
    """Queries of each attention head whose probabilities these searches use; all queries could fill the memory."""
    bias_samples: int = 320
    """Approximate number of samples that the mean errors of a unit's output channels are taken from."""
    judged_samples: int = 320
    """Approximate number of held-out samples that a unit is judged on."""
    storage: Literal["float32", "bfloat16"] = "float32"
    """Type of stored activations; bfloat16 takes half the memory and rounds them to 8 significant bits."""
    memory_budget: MemoryBudget = field(default_factory=MemoryBudget)
    """Memory for stored activations."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Sampler of the trajectories; it also samples the images of the evaluation, unless evaluation.sampler is set."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        require_count(self.num_trajectories, "calibration.num_trajectories")
        require_count(self.held_out_trajectories, "calibration.held_out_trajectories")
        require(
            self.num_trajectories + self.mismatch_trajectories <= MOST_TRAJECTORIES,
            "calibration.num_trajectories + calibration.mismatch_trajectories",
            f"at most {MOST_TRAJECTORIES}",
            self.num_trajectories + self.mismatch_trajectories,
        )
        require(
            self.mismatch_trajectories >= self.held_out_trajectories,
            "calibration.mismatch_trajectories",
            f"at least calibration.held_out_trajectories ({self.held_out_trajectories})",
            self.mismatch_trajectories,
        )
        require_count(self.batch_size, "calibration.batch_size", most=2**20)
        for name in ("observed_samples", "probe_samples", "probe_queries", "bias_samples", "judged_samples"):
            require_count(getattr(self, name), f"calibration.{name}")
        self.memory_budget.check()
        self.sampler.check("calibration.sampler")

    @property
    def indices(self) -> range:
        """Numbers of all noises that calibration samples from."""
        return range(self.num_trajectories + self.mismatch_trajectories)
