"""What every shipped config and model give is the same on every engine: along real trajectories, and in its images."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.backends import backends
from benchmarks.common import ROOT, watch

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "paper")
CASES = [(path, "fashion-mnist-ddpm", None) for path in CONFIGS]
CASES += [(ROOT / "configs" / "w4a8.yaml", f"fashion-mnist-{name}", 2.0) for name in ("latent", "dit")]
"""Config, model, guidance."""
FEW: dict[str, Any] = {
    "calibration.num_trajectories": 8,
    "calibration.held_out_trajectories": 2,
    "calibration.mismatch_trajectories": 2,
    "reconstruction.iterations": 12,
    "reconstruction.batch_size": 16,
    "evaluation.num_trajectories": 2,
    "evaluation.num_images": 2,
    "trainer.threads": 1,
    "logging.tensorboard": "false",
}
"""All 20 timesteps and all units, with few samples and steps of each."""
SAME_IMAGES = 40.0
"""dB of PSNR."""
SAME_STEPS = 1e-4
"""Median relative error of a denoiser call."""
ALIKE = 4.0
"""Times what the simulation in float64 differs by from that in float32, in squared error, that an engine may differ by
where that is more: at 4 bits one value that falls to the other side of a code moves those behind it, whoever rounds."""


@pytest.mark.slow
@pytest.mark.parametrize(("path", "model", "guidance"), CASES, ids=lambda value: getattr(value, "stem", str(value)))
def test_engines_compute_the_model_of_every_config(
    path: Path, model: str, guidance: float | None, tmp_path: Path
) -> None:
    settings = FEW | {"model.path": model, "run_dir": tmp_path / "run"}
    settings |= {} if guidance is None else {"conditioning.guidance_scale": guidance}
    changes = [f"--{key}={value}" for key, value in settings.items()]
    watch([sys.executable, str(ROOT / "train.py"), "--config", str(path), *changes])
    found = backends(tmp_path / "run" / "quantized", samples=8, guidance_scale=guidance)
    itself = found["float64"]
    largest = max(SAME_STEPS, ALIKE * itself["median_error"])
    lowest = min(SAME_IMAGES, itself["psnr"] - 10 * math.log10(ALIKE))
    for engine, row in found["engines"].items():
        assert row["median_error"] <= largest, (engine, found)
        assert row["psnr"] >= lowest, (engine, found)
        assert row["integer_products"] > 10, (engine, found)
