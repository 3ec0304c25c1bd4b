"""The example of docs/extending.md: a reparameterization in a file outside of the package."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from torch import nn

from tcaq_lightning import quantize
from tcaq_lightning.calibration.callback import CalibrationCallback
from tcaq_lightning.calibration.initialize import Choices, Observations
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.config import (
    ActivationConfig,
    CalibrationConfig,
    Config,
    EvaluationConfig,
    PARConfig,
    QuantizationConfig,
    ReconstructionConfig,
    SamplerConfig,
    TCRConfig,
    TrainerConfig,
)
from tcaq_lightning.methods.reparameterization import REPARAMETERIZATIONS
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.quantizers.observers import RangeStatistics
from tests.tiny_models import seven_units

EXAMPLE = Path(__file__).parents[2] / "docs" / "extending" / "method.py"
NAME = "clipped_smoothquant"


@pytest.fixture(autouse=True)
def example() -> None:
    """Import the example, as `extensions` does."""
    spec = importlib.util.spec_from_file_location("extending_method", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


class Doubled(CalibrationCallback):
    """Doubles the steps of an input when they are set, as a method of one's own may."""

    def on_unit_initialized(self, visit: Visit, unit: nn.Module, observed: Observations, choices: Choices) -> None:
        if visit.name == "conv_in":
            quantizer: Any = unit.get_submodule("input_quantizer")
            self.before = quantizer.delta.clone()
            quantizer.delta *= 2


def test_a_reparameterization_of_ones_own_is_chosen_by_name(tmp_path: Path) -> None:
    config = Config(
        calibration=CalibrationConfig(2, 1, 1, sampler=SamplerConfig(num_steps=2, options={"clip_sample": False})),
        quantization=QuantizationConfig(activation=ActivationConfig(bits=4, timestep_groups=2)),
        tcr=TCRConfig(formula=NAME, learn=False),
        par=PARConfig(enabled=False),
        reconstruction=ReconstructionConfig(enabled=False),
        evaluation=EvaluationConfig(num_trajectories=1, num_images=1),
        trainer=TrainerConfig(accelerator="cpu"),
    )
    doubled = Doubled()
    quantized: Any = quantize(DDPMPipeline(seven_units(), DDIMScheduler()), config, tmp_path / "run", [doubled])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    errors = [e for unit in metrics["units"] for e in unit["tcr_output_error"].values()]
    assert all(after <= before for before, after in errors)  # r = 1 is among its candidates
    assert any(after < before for before, after in errors)
    r = [layer.input_quantizer.r for layer in quant_layers(quantized.unet).values()]
    assert any(bool((values != 1).any()) for values in r)
    assert all(abs(float(values.log().mean())) < 0.3 for values in r)  # geometric mean 1 but for the truncation
    assert torch.equal(quantized.unet.conv_in.input_quantizer.delta, 2 * doubled.before)


def test_its_candidates_look_past_a_single_group() -> None:
    ranges = RangeStatistics(3, 4)
    ranges.low = torch.zeros(3, 4)
    ranges.high = torch.tensor([[1.0, 4.0, 1.0, 1.0], [1.0, 4.0, 1.0, 1.0], [1.0, 4.0, 1.0, 900.0]])
    grid = REPARAMETERIZATIONS[NAME](TCRConfig()).candidates(ranges, torch.ones(4))
    assert torch.equal(grid[0], torch.ones(4))
    assert torch.equal(grid[:, 3], grid[:, 0])
    torch.testing.assert_close(grid[2, 1] / grid[2, 0], torch.tensor(2.0))
