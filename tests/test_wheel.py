"""The wheel, installed alone in a fresh environment and used from another directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
QUANTIZE = """
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

from tcaq_lightning import quantize
from tcaq_lightning.config import (
    ActivationConfig,
    CalibrationConfig,
    Config,
    EvaluationConfig,
    QuantizationConfig,
    ReconstructionConfig,
    SamplerConfig,
    TrainerConfig,
)

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    layers_per_block=1,
    block_out_channels=(8,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    norm_num_groups=4,
    add_attention=False,
)
config = Config(
    calibration=CalibrationConfig(2, 1, 1, sampler=SamplerConfig(num_steps=2)),
    quantization=QuantizationConfig(activation=ActivationConfig(timestep_groups=2)),
    reconstruction=ReconstructionConfig(iterations=8, batch_size=4),
    evaluation=EvaluationConfig(num_trajectories=1, num_images=2),
    trainer=TrainerConfig(accelerator="cpu"),
)
quantized = quantize(DDPMPipeline(unet, DDIMScheduler()), config, "run")
assert quantized.unet.conv_in.weight_quantizer.codes.shape == (8, 1, 3, 3)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the repository, so that nothing is left in it."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    kept = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.egg-info", "site")
    shutil.copytree(ROOT, source, ignore=kept)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        "out",
        source,
    ]
    subprocess.run(command, cwd=directory, check=True)
    (file,) = (directory / "out").iterdir()
    return file


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of a fresh environment with the wheel; its dependencies are those of the one that runs the tests."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=False)
    interpreter = directory / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", "--quiet", wheel]
    subprocess.run(install, check=True)
    (site,) = directory.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def run(python: Path, *args: str, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([python, *args], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_only_the_package_is_installed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"tcaq_lightning"}
    files = [p for p in (ROOT / "tcaq_lightning").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {p.relative_to(ROOT).as_posix() for p in files} == {n for n in names if ".dist-info/" not in n}


def test_the_commands_run(python: Path, tmp_path: Path) -> None:
    place = run(python, "-c", "import tcaq_lightning; print(tcaq_lightning.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(python.parents[1])
    assert "evaluate" in run(python, "-m", "tcaq_lightning", "--help", cwd=tmp_path)
    for command in ("sample", "evaluate", "statistics", "report", "compare", "convert", "export", "config"):
        assert command in run(python, "-m", "tcaq_lightning", command, "--help", cwd=tmp_path)
    shipped = ("sample", "fashion-mnist-ddpm", "--output", "images.png", "--num", "1", "--num_steps", "1")
    run(python, "-m", "tcaq_lightning", *shipped, cwd=tmp_path)
    assert (tmp_path / "images.png").is_file()


def test_quantize_runs(python: Path, tmp_path: Path) -> None:
    run(python, "-W", "ignore", "-c", QUANTIZE, cwd=tmp_path)
    assert (tmp_path / "run" / "report.md").is_file()
    missing = "import importlib.util as u; print([n for n in ('callbacks', 'benchmarks', 'tests') if u.find_spec(n)])"
    assert run(python, "-c", missing, cwd=tmp_path) == "[]\n"
