"""What a run computes once, reads when it goes on, and makes again when its file is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tcaq_lightning.calibration import stored
from tcaq_lightning.calibration.run_files import RunFiles
from tcaq_lightning.calibration.state import Setup
from tcaq_lightning.calibration.stored import stored_sensitivities, stored_trajectories
from tcaq_lightning.config import (
    ActivationConfig,
    CalibrationConfig,
    Config,
    QuantizationConfig,
    ReconstructionConfig,
    SamplerConfig,
)
from tcaq_lightning.models.sampling import LoopSampling

NAME = "mid_block.resnets.0"


@pytest.fixture
def setup(make_twins: Any, tmp_path: Path) -> Setup:
    """Of a run that has written nothing."""
    twins = make_twins(attention=False)
    return Setup(
        config=Config(
            calibration=CalibrationConfig(2, 1, 1, sampler=SamplerConfig(num_steps=2)),
            quantization=QuantizationConfig(activation=ActivationConfig(timestep_groups=2)),
        ),
        full=twins.full,
        quantized=twins.quantized,
        sampling=LoopSampling(DDIMScheduler(clip_sample=False)),
        graph=twins.graph,
        timestep_groups=twins.timestep_groups,
        limits={"device": 0.0, "host": 1e9, "disk": 0.0},
        files=RunFiles(tmp_path),
    )


def counting(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """What a function of the module returns, call by call."""
    original, returned = getattr(stored, name), []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        returned.append(original(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(stored, name, wrapper)
    return returned


def trajectories_of(setup: Setup) -> Any:
    return stored_trajectories(setup.files.trajectories, setup.config, setup.full, setup.sampling, [0, 1])


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def test_trajectories_are_collected_once_in_a_run(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    made = counting(monkeypatch, "collect_together")
    first = trajectories_of(setup)
    again = trajectories_of(setup)
    assert len(made) == 1
    assert torch.equal(again.inputs, first.inputs)
    assert torch.equal(again.finals, first.finals)
    damage(setup.files.trajectories.path)
    assert torch.equal(trajectories_of(setup).inputs, first.inputs)
    assert len(made) == 2


def test_errors_are_weighed_once_in_a_run(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectories, made = trajectories_of(setup), counting(monkeypatch, "unit_sensitivities")

    def weighed() -> Tensor:
        return stored_sensitivities(setup, trajectories)[NAME]

    first = weighed()
    assert first.shape == (2, 16)
    assert torch.equal(weighed(), first)
    assert len(made) == 1
    damage(setup.files.sensitivities.path)
    assert torch.equal(weighed(), made[1][NAME])


def test_all_errors_weigh_alike_where_the_configuration_says_so(setup: Setup) -> None:
    setup.config.reconstruction = ReconstructionConfig(weighting="uniform")
    assert stored_sensitivities(setup, trajectories_of(setup)) == {}
    assert not setup.files.sensitivities.exists()
