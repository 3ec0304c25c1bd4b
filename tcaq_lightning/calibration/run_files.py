"""Where a run keeps its files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.files import load_tensors, save_tensors

DIRECTORIES = (
    *("calibration", "evaluation", "plots", "quantized", "report", "rounds", "samples", "tensorboard"),
    *("rounds/*", "rounds/*/units", "rounds/*/statistics", "evaluation/*"),
)
"""Patterns of what a run makes as directories."""
FILES = ("manifest.json", "config.yaml", "metrics.json", "report.md", "report.html", "plots/*", "samples/*")
"""Patterns of what it writes as files."""


@dataclass(frozen=True)
class RunFile:
    """A file of a run, which says itself what it is of: it is of no use elsewhere.

    Attributes:
        path: of the file.
        place: of which run, and which round, unit or phase, JSON-ready.
    """

    path: Path
    place: Mapping[str, Any]

    def save(self, tensors: dict[str, Tensor], record: Any = None) -> None:
        """Write tensors and a JSON-ready record."""
        save_tensors(self.path, tensors, record, self.place)

    def load(self) -> tuple[dict[str, Tensor], Any]:
        """Tensors and record.

        Raises:
            DamagedFileError: truncated, altered, or written as something else.
        """
        return load_tensors(self.path, self.place)

    def exists(self) -> bool:
        """Whether there is such a file, in whatever state."""
        return self.path.exists()


@dataclass(frozen=True)
class RunFiles:
    """Files in RUN_DIR.

    Attributes:
        directory: RUN_DIR.
        run: identity of the run, by its settings and inputs; empty where nobody asks.
        shared: directory of what runs share; None keeps it in RUN_DIR.

    >>> RunFiles(Path("runs/mine")).unit(Visit(0, 3, "conv_out")).path.as_posix()
    'runs/mine/rounds/00/units/003-conv_out.safetensors'
    """

    directory: Path
    run: str = ""
    shared: Path | None = None

    @property
    def manifest(self) -> Path:
        """What the run is, and what is finished."""
        return self.directory / "manifest.json"

    @property
    def trajectories(self) -> RunFile:
        """Calibration data: trajectories of the full-precision sampler."""
        return self._file("calibration/trajectories.safetensors", "trajectories")

    @property
    def sensitivities(self) -> RunFile:
        """Weights of the units' errors."""
        return self._file("calibration/sensitivities.safetensors", "sensitivities")

    @property
    def artifact(self) -> Path:
        """Directory of the quantized pipeline."""
        return self.directory / "quantized"

    @property
    def evaluation(self) -> Path:
        """Directory of finished batches of images."""
        return (self.shared or self.directory) / "evaluation"

    @property
    def images(self) -> RunFile:
        """The first images of the evaluation, uint8 (N, C, H, W) by `full` and `quantized`."""
        return self._file("samples/images.safetensors", "images")

    def round_dir(self, round_index: int) -> Path:
        """Directory of a round."""
        return self.directory / "rounds" / f"{round_index:02d}"

    def aligned_trajectories(self, round_index: int) -> RunFile:
        """Trajectories of the quantized sampler that a round learns from."""
        return self._of_round("trajectories.safetensors", "aligned trajectories", round_index)

    def held_out(self, round_index: int) -> RunFile:
        """Trajectories of the quantized sampler after a round, from held-out noise."""
        return self._of_round("held_out.safetensors", "held-out trajectories", round_index)

    def unit(self, visit: Visit) -> RunFile:
        """Finished state of a unit."""
        return self._of_unit("units/{}.safetensors", "unit", visit)

    def statistics(self, visit: Visit) -> RunFile:
        """What was observed of a unit before anything was set."""
        return self._of_unit("statistics/{}.safetensors", "statistics", visit)

    def checkpoint(self, visit: Visit, phase: str) -> RunFile:
        """Checkpoint of the fit that is running."""
        place = {"position": visit.position, "unit": visit.name, "phase": phase}
        name = f"unit-{visit.position:03d}-{phase}.ckpt"
        return self._of_round(name, "checkpoint", visit.round_index, **place)

    def _of_unit(self, name: str, kind: str, visit: Visit) -> RunFile:
        name = name.format(f"{visit.position:03d}-{visit.name}")
        return self._of_round(name, kind, visit.round_index, position=visit.position, unit=visit.name)

    def _of_round(self, name: str, kind: str, round_index: int, **place: Any) -> RunFile:
        return self._file(f"rounds/{round_index:02d}/{name}", kind, round=round_index, **place)

    def _file(self, name: str, kind: str, **place: Any) -> RunFile:
        return RunFile(self.directory / name, {"file": kind, "run": self.run, **place})


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
