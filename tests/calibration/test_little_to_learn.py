"""Runs with units that have nothing to learn, and in every type of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

from tcaq_lightning import quantize
from tcaq_lightning.config import (
    ActivationConfig,
    CalibrationConfig,
    Config,
    EvaluationConfig,
    LayerRule,
    LoggingConfig,
    QuantizationConfig,
    ReconstructionConfig,
    SamplerConfig,
    TrainerConfig,
)
from tcaq_lightning.models.pipelines import sample
from tcaq_lightning.nn.parts import quant_layers
from tests.toy_pipelines import pixel_unet


def run(directory: Path, rules: list[LayerRule], dtype: torch.dtype = torch.float32, **rates: float) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = pixel_unet().to(dtype)
    config = Config(
        calibration=CalibrationConfig(2, 1, 1, sampler=SamplerConfig(num_steps=2, options={"clip_sample": False})),
        quantization=QuantizationConfig(activation=ActivationConfig(timestep_groups=2), rules=rules),
        reconstruction=ReconstructionConfig(iterations=6, batch_size=4, compile_kernels=False, **rates),  # type: ignore[arg-type]
        evaluation=EvaluationConfig(num_trajectories=1, num_images=2),
        logging=LoggingConfig(tensorboard=False),
        trainer=TrainerConfig(accelerator="cpu"),
    )
    return quantize(DDPMPipeline(unet, DDIMScheduler()), config, directory)


@pytest.mark.parametrize(
    ("rules", "quantized"),
    [
        ([LayerRule(pattern="conv_in", keep=True)], True),
        pytest.param([LayerRule(pattern="*", keep=True)], False, marks=pytest.mark.slow),
        pytest.param([LayerRule(role="block", keep=True)], True, marks=pytest.mark.slow),
    ],
)
def test_a_unit_that_is_kept_in_full_precision(tmp_path: Path, rules: list[LayerRule], quantized: bool) -> None:
    pipeline = run(tmp_path, rules)
    assert "conv_in" not in quant_layers(pipeline.unet) or rules[0].role == "block"
    assert bool(quant_layers(pipeline.unet)) == quantized


@pytest.mark.slow
def test_rates_of_zero(tmp_path: Path) -> None:
    assert quant_layers(run(tmp_path, [], step_lr=0.0, r_lr=0.0, scale_lr=0.0).unet)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_an_unconditional_model_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    pipeline = run(tmp_path, [], dtype)
    assert pipeline.unet.dtype is dtype
    assert quant_layers(pipeline.unet)
    x = sample(pipeline.unet, pipeline.scheduler, SamplerConfig(num_steps=2), [0, 1], seed=0)
    assert x.dtype is dtype
    assert x.isfinite().all()
