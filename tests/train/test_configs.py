"""Every shipped config runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tcaq_lightning.cli import parse_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
RUNNABLE = [path for path in CONFIGS if path.parent.name != "paper"]  # those need checkpoints
BETWEEN = (
    "comfyui",
    "default",
    "1_nearest",
    "brecq",
    "smoothquant",
    "ours",
    "w6a6",
    "w8a8",
    "w4a8",
    "w4a4",
    "peers",
    "2_brecq",
    "3_headroom",
    "4_sensitivity",
    "5_corrections",
    "6_timestep_groups",
    "7_tcr",
    "8_daq",
)
"""Configs that lie between others, in what they switch on or in bits."""


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in BETWEEN), id=path.stem) for path in RUNNABLE],
)
def test_runs(path: Path, command: Any, model: Path, tmp_path: Path) -> None:
    """On a tiny model in the place of the shipped one."""
    groups = parse_config(["--config", str(path)])[0].quantization.activation.timestep_groups
    small = {
        "run_dir": tmp_path / "run",
        "model.path": model,
        "calibration.num_trajectories": 4,
        "calibration.held_out_trajectories": 2,
        "calibration.mismatch_trajectories": 2,
        "calibration.sampler.num_steps": 3,
        "quantization.activation.timestep_groups": min(3, groups),
        "reconstruction.iterations": 8,
        "reconstruction.batch_size": 4,
        "evaluation.num_trajectories": 2,
        "evaluation.num_images": 4,
        "trainer.threads": 1,
        "logging.tensorboard": "false",
    }
    ended = command("--config", path, *(f"--{key}={value}" for key, value in small.items()))
    assert (ended.code, ended.err) == (0, "")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < metrics["noise_error"]["summary"] < 1
    assert (tmp_path / "run" / "quantized" / "unet" / "config.json").is_file()
