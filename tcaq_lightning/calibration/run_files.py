"""Where a run keeps its files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.errors import UserError

DIRECTORIES = (
    *("calibration", "evaluation", "plots", "quantized", "report", "rounds", "samples", "tensorboard"),
    *("rounds/*", "rounds/*/units", "rounds/*/statistics", "evaluation/*"),
)
"""Patterns of what a run makes as directories."""
FILES = ("manifest.json", "config.yaml", "metrics.json", "report.md", "report.html", "plots/*", "samples/*")
"""Patterns of what it writes as files."""


@dataclass(frozen=True)
class RunFiles:
    """Paths in RUN_DIR.

    Attributes:
        directory: RUN_DIR.
        shared: directory of what runs share; None keeps it in RUN_DIR.

    >>> RunFiles(Path("runs/mine")).unit(Visit(0, 3, "conv_out")).as_posix()
    'runs/mine/rounds/00/units/003-conv_out.safetensors'
    """

    directory: Path
    shared: Path | None = None

    @property
    def manifest(self) -> Path:
        """What the run is, and what is finished."""
        return self.directory / "manifest.json"

    @property
    def trajectories(self) -> Path:
        """Calibration data: trajectories of the full-precision sampler."""
        return self.directory / "calibration" / "trajectories.safetensors"

    @property
    def sensitivities(self) -> Path:
        """Weights of the units' errors."""
        return self.directory / "calibration" / "sensitivities.safetensors"

    @property
    def artifact(self) -> Path:
        """Directory of the quantized pipeline."""
        return self.directory / "quantized"

    @property
    def evaluation(self) -> Path:
        """Directory of finished batches of images."""
        return (self.shared or self.directory) / "evaluation"

    @property
    def images(self) -> Path:
        """The first images of the evaluation, uint8 (N, C, H, W) by `full` and `quantized`."""
        return self.directory / "samples" / "images.safetensors"

    def round_dir(self, round_index: int) -> Path:
        """Directory of a round."""
        return self.directory / "rounds" / f"{round_index:02d}"

    def aligned_trajectories(self, round_index: int) -> Path:
        """Trajectories of the quantized sampler that a round learns from."""
        return self.round_dir(round_index) / "trajectories.safetensors"

    def held_out(self, round_index: int) -> Path:
        """Trajectories of the quantized sampler after a round, from held-out noise."""
        return self.round_dir(round_index) / "held_out.safetensors"

    def unit(self, visit: Visit) -> Path:
        """Finished state of a unit."""
        return self.round_dir(visit.round_index) / "units" / f"{visit.position:03d}-{visit.name}.safetensors"

    def statistics(self, visit: Visit) -> Path:
        """What was observed of a unit before anything was set."""
        return self.round_dir(visit.round_index) / "statistics" / f"{visit.position:03d}-{visit.name}.safetensors"

    def checkpoint(self, visit: Visit, phase: str) -> Path:
        """Checkpoint of the fit that is running."""
        return self.round_dir(visit.round_index) / f"unit-{visit.position:03d}-{phase}.ckpt"


def check_places(directory: Path) -> None:
    """See before the work that nothing stands where a run will write.

    Args:
        directory: RUN_DIR, which need not be there.

    Raises:
        UserError: a file is in the place of a directory, or a directory in that of a file, or one that is closed.
    """
    for pattern in DIRECTORIES:
        for path in directory.glob(pattern):
            if not path.is_dir():
                raise UserError(
                    f"run_dir: expected a directory at {path}, got a file; remove it, or use another run_dir"
                )
            if not os.access(path, os.W_OK | os.X_OK):
                raise UserError(f"run_dir: {path} cannot be written to; open it, or use another run_dir")
    for pattern in FILES:
        for path in directory.glob(pattern):
            if path.is_dir():
                raise UserError(
                    f"run_dir: expected a file at {path}, got a directory; remove it, or use another run_dir"
                )
