"""Where and how a run works."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tcaq_lightning.config.checks import Section, require_count, require_positive, require_text, require_threads

MOST_DEVICES = 16
"""Processes that may be asked for on any machine."""
MOST_MINUTES = 525_600
"""A year."""


@dataclass
class TrainerConfig(Section):
    """Where and how it runs; changes nothing in the result but the order of float sums."""

    accelerator: str = "auto"
    """Lightning accelerator: auto, cpu, gpu, mps."""
    devices: int = 1
    """Processes on each node, one device each; torchrun and SLURM set it themselves. A run can be resumed with another
    number: finished units are kept, and the unfinished one starts again."""
    num_nodes: int = 1
    """Nodes; torchrun and SLURM set it themselves. Only the first process reads and writes run_dir."""
    timeout: float = 30.0
    """Minutes that a process waits for another one, for example while rank 0 writes, before the run ends."""
    threads: int | None = None
    """CPU threads of each process; null leaves torch's choice, or divides the cores among several processes.
    Bit-identical repeats need the same number."""
    checkpoint_every: int = 100
    """Optimisation steps between two checkpoints inside a unit."""
    stop_after: str | None = None
    """Name of a unit after which the command ends, in its first round, to try what a large model takes. The same
    command with null continues from there."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        require_count(self.devices, "trainer.devices", most=max(MOST_DEVICES, os.cpu_count() or 1))
        require_count(self.num_nodes, "trainer.num_nodes", most=100_000)
        require_positive(self.timeout, "trainer.timeout", MOST_MINUTES)
        require_threads(self.threads, "trainer.threads")
        require_text(self.stop_after, "trainer.stop_after")
        require_count(self.checkpoint_every, "trainer.checkpoint_every")
