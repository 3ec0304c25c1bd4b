"""The whole main job on a pipeline of every class that takes text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.config import ConditioningConfig, SamplerConfig
from tcaq_lightning.models.pipelines import find_denoiser
from tcaq_lightning.models.sampling import make_sampling
from tcaq_lightning.nn.parts import quant_layers
from tests.text_models import CALL_OPTIONS, TEXT_MODELS, make_text_model

pytest.importorskip("transformers")
FAST = "Flux"


@pytest.mark.parametrize(
    "name", [name if name == FAST else pytest.param(name, marks=pytest.mark.slow) for name in TEXT_MODELS]
)
def test_from_prompts_to_images(name: str, command: Any, tmp_path: Path) -> None:
    make_text_model(name, tmp_path).save_pretrained(tmp_path / "model")
    prompts, options = tmp_path / "prompts.txt", CALL_OPTIONS.get(name, {})
    prompts.write_text("a red boot\na bag\n")
    settings = {
        "run_dir": tmp_path / "run",
        "model.path": tmp_path / "model",
        "conditioning.prompts": prompts,
        "conditioning.options": json.dumps(options),
        "calibration.num_trajectories": 2,
        "calibration.held_out_trajectories": 1,
        "calibration.mismatch_trajectories": 1,
        "calibration.sampler.num_steps": 2,
        "quantization.activation.timestep_groups": 2,
        "reconstruction.iterations": 8,
        "reconstruction.batch_size": 4,
        "evaluation.num_trajectories": 1,
        "evaluation.num_images": 2,
        "trainer.threads": 1,
        "logging.tensorboard": "false",
    }
    ended = command(*(f"--{key}={value}" for key, value in settings.items()))
    assert (ended.code, ended.err) == (0, "")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < metrics["noise_error"]["summary"] < 0.5
    pipeline = load_quantized(tmp_path / "run" / "quantized")
    _, denoiser = find_denoiser(pipeline)
    assert len(quant_layers(denoiser)) > 10
    sampling = make_sampling(pipeline, ConditioningConfig(prompts, options=options))
    images = sampling.sample(denoiser, SamplerConfig(num_steps=2), [0, 1], 0)
    assert images.shape == (2, 3, 16, 16)
    assert images.isfinite().all()
    assert not torch.equal(images[0], images[1])
