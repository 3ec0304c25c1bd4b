"""TensorBoard of a run that was killed is that of an undisturbed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train.conftest import Command
from tests.train.test_resume import CHECKPOINT, SAVE, STEP, STORE

SIZES = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}


def curves(run_dir: Path) -> dict[str, list[Any]]:
    """By tag, (step, value) of scalars and steps of everything else, in the order in which they were written."""
    found = EventAccumulator(str(run_dir / "tensorboard"), SIZES).Reload()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    others = {tag: [e.step for e in found.Images(tag)] for tag in found.Tags()["images"]}
    others |= {tag: [e.step for e in found.Histograms(tag)] for tag in found.Tags()["histograms"]}
    return scalars | others


def test_curves_of_a_killed_run(command: Command, config: Path, tmp_path: Path) -> None:
    args = ("--config", config, "--logging.tensorboard", "true", "--reconstruction.iterations", "12")
    assert command(*args, "--run_dir", tmp_path / "undisturbed").code == 0
    for target, number in ((STEP, 2), (CHECKPOINT, 3), (SAVE, 2), (STORE, 2)):
        assert command(*args, "--run_dir", tmp_path / "run", fault=(target, number, "SIGKILL")).code == -9
    assert command(*args, "--run_dir", tmp_path / "run").code == 0
    expected, got = curves(tmp_path / "undisturbed"), curves(tmp_path / "run")
    assert got == expected
    for tag, points in got.items():
        steps = [point[0] if isinstance(point, tuple) else point for point in points]
        assert steps == sorted(set(steps)), tag
