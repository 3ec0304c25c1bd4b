"""A finished run, for tests that read one."""

from __future__ import annotations

import importlib
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
import yaml

from tests.shared import shared


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN_DIR of a finished run on a random denoiser of seven units, one attention among them."""
    return shared(tmp_path_factory, "trained", _train) / "run"


def _train(root: Path) -> None:
    import torch  # not before it is needed: see conftest.py
    from diffusers import DDIMPipeline, DDIMScheduler

    from tests.tiny_models import seven_units

    DDIMPipeline(seven_units(), DDIMScheduler(num_train_timesteps=100)).save_pretrained(root / "model")
    settings = {
        "run_dir": str(root / "run"),
        "model": {"path": str(root / "model")},
        "calibration": {
            "num_trajectories": 4,
            "held_out_trajectories": 2,
            "mismatch_trajectories": 3,
            "batch_size": 8,
            "sampler": {"num_steps": 4},
        },
        "quantization": {"weight": {"bits": 4}, "activation": {"bits": 4, "timestep_groups": 2}},
        "par": {"rounds": 1, "share": 0.4},
        "reconstruction": {"iterations": 8, "batch_size": 4},
        "evaluation": {"num_trajectories": 2, "num_images": 4, "batch_size": 4, "fid_samples": 0},
        "trainer": {"threads": 1, "accelerator": "cpu"},
        "logging": {"tensorboard": True, "every_n_steps": 1, "grid_images": 4},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(settings))
    script, threads = importlib.import_module("train"), torch.get_num_threads()
    try:
        with (
            mock.patch.object(sys, "argv", ["train.py", "--config", str(root / "tiny.yaml")]),
            redirect_stdout(StringIO()),
        ):
            script.main()
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, for a test to write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
