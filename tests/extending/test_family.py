"""The example of docs/extending.md: a denoiser and its family in a file outside of the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

from tcaq_lightning import load_quantized, quantize
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
from tcaq_lightning.models.families import FAMILIES
from tcaq_lightning.models.graph import trace_units
from tcaq_lightning.models.pipelines import open_pipeline
from tcaq_lightning.models.unets import DENOISERS
from tcaq_lightning.nn.output_layers import output_layer
from tcaq_lightning.runtime.extensions import load_extensions

EXAMPLE = Path(__file__).parents[2] / "docs" / "extending" / "family.py"
RULES = [LayerRule(role=role, weight_bits=8, activation_bits=8) for role in ("input", "output", "time")]
CONFIG = Config(
    calibration=CalibrationConfig(2, 1, 1, sampler=SamplerConfig(num_steps=2, options={"clip_sample": False})),
    quantization=QuantizationConfig(WeightConfig(bits=4), ActivationConfig(bits=4, timestep_groups=2), rules=RULES),
    par=PARConfig(enabled=False),
    reconstruction=ReconstructionConfig(iterations=4, batch_size=2, compile_kernels=False),
    evaluation=EvaluationConfig(num_trajectories=1, num_images=1),
    trainer=TrainerConfig(accelerator="cpu"),
)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    load_extensions([str(EXAMPLE)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DDPMPipeline(DENOISERS["StagedDenoiser"]().eval().requires_grad_(False), DDIMScheduler())


@pytest.fixture
def another_module(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file in another place: what was saved before names a module that there is not."""
    former = type(pipeline.unet).__module__
    module = sys.modules[former]
    monkeypatch.delitem(sys.modules, former)
    monkeypatch.setitem(sys.modules, "stages_elsewhere", module)
    monkeypatch.setattr(DENOISERS["StagedDenoiser"], "__module__", "stages_elsewhere")


def test_stages_are_units_with_an_output_layer(pipeline: Any) -> None:
    denoiser = pipeline.unet
    assert FAMILIES["StagedDenoiser"].__module__ == type(denoiser).__module__
    graph = trace_units(denoiser, lambda: denoiser(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 900.0])))
    assert graph.names == ["stem", "stages.0", "stages.1", "head"]
    assert output_layer(denoiser.stages[1], "stages.1") == ("stages.1.narrow", 1.0)


@pytest.mark.usefixtures("another_module")
def test_a_model_opens_wherever_the_file_of_its_class_is(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"unet": ["some.where", "StagedDenoiser"]}))
    opened: Any = open_pipeline(str(tmp_path))
    assert torch.equal(opened.unet.head.weight, pipeline.unet.head.weight)
    assert "some.where" not in sys.modules


def test_it_is_quantized_by_role_and_its_artifact_opened(pipeline: Any, tmp_path: Path) -> None:
    quantized: Any = quantize(pipeline, CONFIG, tmp_path / "run")
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "metrics.json").read_text())["coverage"]}
    assert rows["stem"]["bits"] == rows["head"]["bits"] == rows["stages.0.to_time"]["bits"] == "W8 A8"
    assert rows["stages.1.widen"]["bits"] == rows["stages.1.narrow"]["bits"] == "W4 A4"
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 400, 900])
    opened: Any = load_quantized(tmp_path / "run" / "quantized")
    assert torch.equal(opened.unet(x, t).sample, quantized.unet(x, t).sample)
