"""The example of docs/extending.md: a number format in a file outside of the package."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from torch import Tensor

from tcaq_lightning import load_quantized, quantize
from tcaq_lightning.backends.graph.build import build_graph
from tcaq_lightning.config import (
    ActivationConfig,
    CalibrationConfig,
    Config,
    EvaluationConfig,
    LayerRule,
    PARConfig,
    QuantizationConfig,
    ReconstructionConfig,
    SamplerConfig,
    TrainerConfig,
    WeightConfig,
)
from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.quantizers import AdaRoundWeight, Rounding, make_format
from tests.tiny_models import seven_units

EXAMPLE = Path(__file__).parents[2] / "docs" / "extending" / "quantizer.py"
NAME, BITS = "pow2", 3


@pytest.fixture(autouse=True)
def example() -> None:
    """Import the example, as `extensions` does."""
    spec = importlib.util.spec_from_file_location("extending_quantizer", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def config(iterations: int = 0, **weight: Any) -> Config:
    return Config(
        calibration=CalibrationConfig(2, 1, 1, sampler=SamplerConfig(num_steps=2, options={"clip_sample": False})),
        quantization=QuantizationConfig(
            WeightConfig(**{"bits": BITS, "format": NAME, **weight}),
            ActivationConfig(timestep_groups=2),
            rules=[LayerRule(role="output", weight_bits=8, weight_format="int")],
        ),
        par=PARConfig(enabled=False),
        reconstruction=ReconstructionConfig(
            enabled=iterations > 0, iterations=max(1, iterations), batch_size=2, compile_kernels=False, gate=False
        ),
        evaluation=EvaluationConfig(num_trajectories=1, num_images=1),
        trainer=TrainerConfig(accelerator="cpu"),
    )


def predictions(pipeline: Any) -> Tensor:
    with torch.no_grad():
        prediction: Tensor = pipeline.unet(torch.linspace(-1, 1, 128).view(2, 1, 8, 8), torch.tensor([100, 900])).sample
    return prediction


@pytest.mark.parametrize(
    "iterations", [pytest.param(0, id="nearest", marks=pytest.mark.slow), pytest.param(4, id="learned")]
)
def test_a_format_of_ones_own_is_calibrated_stored_and_opened(tmp_path: Path, iterations: int) -> None:
    quantized = quantize(DDPMPipeline(seven_units(), DDIMScheduler()), config(iterations), tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert f"W{BITS}({NAME}) A8" in json.dumps(metrics)
    layers = quant_layers(quantized.unet)
    formats = {name: layer.weight_quantizer.number_format.name for name, layer in layers.items()}
    assert formats.pop("conv_out") == "int"
    assert set(formats.values()) == {NAME}
    entries = json.loads((tmp_path / "run" / "quantized" / "unet" / "config.json").read_text())["quantization_config"]
    assert {entry["weight_format"] for name, entry in entries["layers"].items() if name != "conv_out"} == {NAME}
    opened = load_quantized(tmp_path / "run" / "quantized")
    assert torch.equal(predictions(opened), predictions(quantized))
    with pytest.raises(UserError, match=rf"unsupported layer \S+: its weight has the number format {NAME}") as caught:
        build_graph(opened.unet, "artifact")
    assert "\n" not in str(caught.value)


def test_weights_are_its_levels_in_steps_of_their_groups_scale() -> None:
    weight = torch.randn(4, 40, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer = AdaRoundWeight(weight, make_format(NAME, BITS))
    r = torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.5
    quantizer.search(r)
    assert quantizer.scale.shape == (4, 3)
    for group in range(3):  # of 16, 16 and 8 inputs
        part = slice(16 * group, 16 * (group + 1))
        steps = quantizer(r)[:, part] * r[part].view(1, -1, 1, 1) / quantizer.scale[:, group].view(4, 1, 1, 1)
        levels = torch.tensor([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0])
        assert float((steps[..., None] - levels).abs().amin(-1).max()) < 1e-6
    nearest = quantizer(r)
    quantizer.begin_learning(Rounding.SOFT, r)
    soft = quantizer(r)
    quantizer.end_learning()
    inside = (weight * r.view(1, -1, 1, 1)).abs() < quantizer.delta.repeat_interleave(16, 1)[:, :40, None, None]
    torch.testing.assert_close(soft[inside], weight[inside], rtol=1e-4, atol=1e-4)  # where V starts
    assert float((nearest - weight).square().mean()) < 0.1


def test_what_the_format_lacks_is_refused() -> None:
    for mistake in ({"bits": 5}, {"symmetric": False}):
        with pytest.raises(UserError, match=rf"quantization\.weight\..* {NAME}"):
            quantize(DDPMPipeline(seven_units(), DDIMScheduler()), config(**mistake), None)
