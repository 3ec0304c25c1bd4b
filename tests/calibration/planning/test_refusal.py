"""A plan that this machine cannot do is refused before anything is written."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from tcaq_lightning.calibration.planning.plan import Plan
from tcaq_lightning.errors import UserError

PLAN = Plan(
    processes=1,
    units=2,
    samples=10,
    layers={"W4 A8": 3},
    kept=[],
    steps=100,
    store_bytes={"device": 0, "host": 1000, "disk": 0},
    limits={"device": 0.0, "host": math.inf, "disk": math.inf},
    model_bytes=1000,
    workspace_bytes={"learn": 1000},
    seconds=60.0,
    evaluation_seconds=60.0,
    trajectory_bytes=0,
    image_bytes=0,
)


def test_what_fits(tmp_path: Path) -> None:
    PLAN.check(tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seconds": 8000 * 3600.0}, "8000.0 h, more than 90 days"),
        ({"seconds": math.inf}, "more than 90 days.*reconstruction.iterations"),
        ({"evaluation_seconds": 8000 * 3600.0}, "evaluation takes 8000.0 h; lower evaluation.num_images"),
        ({"seconds": 46 * 86400.0, "evaluation_seconds": 45 * 86400.0}, "more than 90 days.*calibration.num_traj"),
        ({"workspace_bytes": {"search": 10, "learn": 10**17}}, "1e\\+08 GB of memory"),
        ({"store_bytes": {"device": 0, "host": 10**17, "disk": 0}}, "of memory"),
        ({"image_bytes": 10**17}, "evaluation.num_images"),
        ({"trajectory_bytes": 10**19}, "GB are free"),
        ({"store_bytes": {"device": 0, "host": 0, "disk": 10**19}}, "GB are free"),
    ],
)
def test_what_does_not(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(PLAN, **changes).check(tmp_path / "new")


def test_trajectories_that_are_there_take_no_further_space(tmp_path: Path) -> None:
    (tmp_path / "calibration").mkdir()
    dataclasses.replace(PLAN, trajectory_bytes=10**19).check(tmp_path)
