"""What a finished run has left, run as a user runs it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tcaq_lightning import load_quantized
from tcaq_lightning.config import SamplerConfig
from tcaq_lightning.evaluation.denoiser_errors import image_error
from tcaq_lightning.evaluation.evaluate import IMAGES_START
from tcaq_lightning.models.pipelines import find_denoiser, open_pipeline, sample
from tcaq_lightning.runtime.files import load_tensors
from tests.shared import shared
from tests.train.conftest import Command, Settings, contents

ROOT = Path(__file__).parents[2]


def train(*args: str | Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


@pytest.fixture(scope="module")
def run_dir(command: Command, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with TensorBoard, in a directory that is not there yet, from elsewhere than the repository."""

    def run(root: Path) -> None:
        place = ("--run_dir", root / "deep" / "run")
        ended = command("--config", config, *place, "--logging.tensorboard", "true", cwd=root)
        assert (ended.code, ended.err) == (0, "")
        assert "time" in ended.out
        assert "round 2/2 unit 7/7 conv_out" in ended.out
        assert str(root / "deep" / "run" / "quantized") in ended.out.replace("\n", "")

    return shared(tmp_path_factory, "whole", run) / "deep" / "run"


@pytest.mark.slow
def test_a_process_of_its_own_does_the_same(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    process = train("--config", config, "--run_dir", tmp_path / "run", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert "round 2/2 unit 7/7 conv_out" in out
    assert contents(tmp_path / "run" / "quantized") == contents(undisturbed / "quantized")


def test_artifact_is_that_of_another_directory(run_dir: Path, undisturbed: Path) -> None:
    """The location, TensorBoard and the way it was started leave no trace."""
    assert contents(run_dir / "quantized") == contents(undisturbed / "quantized")
    for content in contents(run_dir / "quantized").values():
        assert b"/run" not in content
        assert b"/tiny" not in content


@pytest.fixture
def threads(settings: Settings) -> Iterator[None]:
    """As many as the run had: the order of float sums depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings["trainer"]["threads"])
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_artifact_samples_what_was_measured(run_dir: Path, settings: Settings) -> None:
    metrics = json.loads((run_dir / "metrics.json").read_text())
    sampler, drawn = SamplerConfig(num_steps=3), []
    for pipeline in (load_quantized(run_dir / "quantized"), open_pipeline(settings["model"]["path"])):
        denoiser = find_denoiser(pipeline)[1]
        batches = [range(IMAGES_START + i, IMAGES_START + i + 2) for i in (0, 2)]
        drawn.append(torch.cat([sample(denoiser, pipeline.scheduler, sampler, batch, 0) for batch in batches]))
    error = image_error(*drawn)
    assert metrics["same_noise"] == {**dataclasses.asdict(error), "num_images": 4}
    kept = [load_tensors(file)[0]["samples"] for file in sorted(run_dir.glob("evaluation/*/*"))]
    assert any(torch.equal(drawn[0][:2], k) for k in kept)


def test_files(run_dir: Path) -> None:
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert len(metrics["units"]) == 14
    assert len(metrics["rounds"]) == 2
    assert metrics["bytes"]["quantized"] < metrics["bytes"]["full"] / 3
    report = (run_dir / "report.md").read_text()
    assert "samples/grid.png" in report
    assert "down_blocks.0.attentions.0" in report
    assert Image.open(run_dir / "samples" / "grid.png").size[0] > 100
    assert not [p for p in run_dir.rglob("*") if p.name.startswith(".") or p.suffix == ".ckpt"]


def test_executions_are_counted(run_dir: Path, settings: Settings) -> None:
    calibration, steps = settings["calibration"], settings["calibration"]["sampler"]["num_steps"]
    units = json.loads((run_dir / "metrics.json").read_text())["units"]
    for unit in units:
        learned = calibration["num_trajectories"] if unit["round"] == 0 else calibration["num_trajectories"] // 2
        assert unit["samples"] == steps * (learned + calibration["held_out_trajectories"])
        counts = unit["executions"]
        assert counts["full_stream"] == unit["samples"]
        assert counts["quantized_stream"] == (0 if unit["unit"] == "conv_out" else unit["samples"])
        optimised = (counts.get("learn_r", 0) + counts["learn_v"]) / settings["reconstruction"]["batch_size"]
        assert optimised == {0: 12, 1: 8}[unit["round"]]
        assert ("observe" in counts) == (unit["round"] == 0)
    assert "## Executions" in (run_dir / "report.md").read_text()


def test_tensorboard(run_dir: Path) -> None:
    events = EventAccumulator(str(run_dir / "tensorboard"), {"images": 0, "histograms": 0}).Reload()
    tags: dict[str, Any] = events.Tags()
    first, later = "round0/02-down_blocks.0.resnets.0", "round1/02-down_blocks.0.resnets.0"
    attention = "round0/03-down_blocks.0.attentions.0"
    scalars = [
        *(f"reconstruction/{tag}" for tag in (f"{first}/r", f"{first}/v", f"{later}/v")),
        *(f"rounding/{tag}" for tag in (f"{first}/v", f"{later}/v")),
        *(f"{kind}/{tag}" for kind in ("held_out", "undecided_share", "flipped_share") for tag in (first, later)),
        f"undecided/{first}/v",
        f"tcr_output_error/{first}/conv1.input_quantizer/r_chosen",
        *(f"daq/{attention}/processor.probabilities/{k}" for k in ("likelihood_ratio", "logarithmic", "log_error")),
        *("mismatch/round0", "mismatch/round1", "mismatch/mean", "noise_error/by_timestep"),
        *("final/noise_error", "final/image_mse", "final/image_psnr"),
    ]
    assert [t for t in scalars if t not in tags["scalars"]] == []
    assert [e.step for e in events.Scalars(f"reconstruction/{first}/v")] == list(range(1, 10))
    histograms = [f"log_{k}/{first}/{phase}" for k, phase in (("r", "r"), ("steps", "r"), ("steps", "v"))]
    histograms.append(f"r/{first}/conv1.input_quantizer")
    assert [t for t in histograms if t not in tags["histograms"]] == []
    images = [
        "held_out_images",
        "images",
        f"ranges/{first}/conv1.input_quantizer",
        f"daq/{attention}/processor.probabilities",
    ]
    assert [t for t in images if t not in tags["images"]] == []
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_finished_run_is_left_alone(command: Command, config: Path, run_dir: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    ended = command("--config", config, "--run_dir", run_dir, "--logging.grid_images", "2")
    assert (ended.code, ended.err) == (0, "")
    assert "finished" in ended.out
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before


def test_dry_run(command: Command, config: Path, tmp_path: Path) -> None:
    ended = command("--config", config, "--run_dir", tmp_path / "run", "--dry_run")
    assert (ended.code, ended.err) == (0, "")
    assert not (tmp_path / "run").exists()
    text = "".join(line.split("│")[1].strip() if "│" in line else "" for line in ended.out.splitlines())
    for name in ("down_blocks.0.attentions.0.to_out.0", "up_blocks.0.resnets.1.conv_shortcut"):
        assert name in text
    assert "W4 A8" in ended.out


def test_dry_run_of_a_finished_run(command: Command, config: Path, undisturbed: Path) -> None:
    before = contents(undisturbed)
    ended = command("--config", config, "--run_dir", undisturbed, "--dry_run")
    assert ended.code == 0
    assert "coverage" in ended.out
    assert contents(undisturbed) == before


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_to_a_real_process(config: Path, tmp_path: Path, number: int, code: int) -> None:
    process = train("--config", config, "--run_dir", tmp_path / "run")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 1/2 unit 3/7"):
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, "")
