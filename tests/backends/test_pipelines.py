"""Pipelines of every class, their denoiser on an engine: the images of the simulated model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tcaq_lightning.artifact.directory import freeze, save_artifact
from tcaq_lightning.backends.kernels import check_kernels
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.errors import UserError
from tcaq_lightning.models.pipelines import find_denoiser
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tests.backends.conftest import set_parameters
from tests.families import W4A8
from tests.text_models import CALL_OPTIONS, TEXT_MODELS, TOKENS, make_text_model
from tests.toy_pipelines import PIPELINES, make_pipeline

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
pytest.importorskip("transformers")
OPTIONS: dict[str, dict[str, Any]] = {
    "SD3": {"tokens": 2 * TOKENS},  # CLIP's and T5's, one behind the other
    "Flux": {"tokens": TOKENS, "latents": (8, 8)},
    "PixArt": {"tokens": TOKENS},
}
"""What the export has to be told, as the call is another than the published model's."""
CALLS: dict[str, dict[str, Any]] = {
    "class": {"class_labels": [3, 1], "guidance_scale": 3.0, "num_inference_steps": 2},
    "dit": {"class_labels": [3, 1], "guidance_scale": 2.0, "num_inference_steps": 2},
    "consistency": {"batch_size": 2, "class_labels": [3, 1], "num_inference_steps": 1},
}
FAST = ("consistency", "onnxruntime")
EVERY = [
    pytest.param(name, backend, marks=() if (name, backend) == FAST else pytest.mark.slow)
    for name in (*TEXT_MODELS, *PIPELINES)
    for backend in ("openvino", "onnxruntime")
]


def write_artifact(name: str, directory: Path) -> Path:
    pipeline = make_text_model(name, directory) if name in TEXT_MODELS else make_pipeline(name)
    part, denoiser = find_denoiser(pipeline)
    denoiser.requires_grad_(False).eval()
    unit = 1000 if name == "Flux" else 1  # it is called with t / 1000
    quantize(denoiser, W4A8, TimestepGroups([300.0 / unit, 600.0 / unit]))
    set_parameters(denoiser)
    freeze(denoiser)
    save_artifact(pipeline, part, denoiser, directory / "quantized", {})
    return directory / "quantized"


def images_of(pipeline: Any, name: str) -> torch.Tensor:
    call = CALLS.get(name) or {"prompt": ["a red boot", "bag"], "num_inference_steps": 2, **CALL_OPTIONS.get(name, {})}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        return torch.as_tensor(pipeline(**call, generator=generator, output_type="np").images)


@pytest.mark.parametrize(("name", "backend"), EVERY)
def test_pipelines_give_the_simulated_images(name: str, backend: str, tmp_path: Path) -> None:
    artifact = write_artifact(name, tmp_path)
    loaded = load_quantized(artifact, backend=backend, threads=1, **OPTIONS.get(name, {}))
    expected, got = images_of(load_quantized(artifact), name), images_of(loaded, name)
    assert expected.std() > 0.01
    assert (got - expected).square().mean() < 1e-4  # 40 dB of images in [0, 1]
    _, stand_in = find_denoiser(loaded)
    check_kernels(stand_in.engine.kernels(), backend)


@pytest.mark.slow
def test_another_length_of_the_context_is_named(tmp_path: Path) -> None:
    loaded = load_quantized(write_artifact("PixArt", tmp_path), backend="onnxruntime", threads=1, tokens=7)
    with pytest.raises(UserError, match=r"exported for shape \(B, 7, 12\), got \(4, 16, 12\); .* tokens"):
        images_of(loaded, "PixArt")
