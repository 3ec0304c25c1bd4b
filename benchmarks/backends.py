"""Whether an engine computes the artifact: its error against the simulated model along trajectories, and its images.

What the simulation in float64 differs by from itself in float32 is reported beside it: where float sums are rounded
otherwise, single values next to the edge of a code fall on its other side, and images of few bits show it.

python -m benchmarks.backends --artifact runs/fashion-mnist-ddpm-w4a8/quantized
python -m benchmarks.backends --artifact runs/fashion-mnist-latent-w4a8/quantized --guidance_scale 2
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.common import median, run
from tcaq_lightning.backends.kernels import check_kernels
from tcaq_lightning.backends.load import load_quantized
from tcaq_lightning.backends.stand_in import EnginePrediction
from tcaq_lightning.config import ConditioningConfig, SamplerConfig
from tcaq_lightning.evaluation.denoiser_errors import image_error, noise_error
from tcaq_lightning.models.pipelines import find_denoiser
from tcaq_lightning.models.sampling import make_sampling
from tcaq_lightning.models.trajectories import collect

SEED = 7


class InFloat64(nn.Module):
    """A simulated model whose every operation is in float64; inputs and predictions keep their type."""

    def __init__(self, simulated: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.config = copy.deepcopy(simulated).double(), simulated.config
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Predict, with the arguments of the denoiser's own `forward`."""
        wide = tree_map(_in_float64, (args, kwargs))
        prediction = self.denoiser(*wide[0], **wide[1], return_dict=False)[0].float()
        return EnginePrediction(sample=prediction) if return_dict else (prediction,)


def _in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def backends(
    artifact: Path,
    samples: int = 8,
    steps: int = 20,
    guidance_scale: float | None = None,
    engines: tuple[str, ...] = ("openvino", "onnxruntime"),
    threads: int = 1,
) -> dict[str, Any]:
    """Compare engines with the simulation in PyTorch.

    Args:
        artifact: directory of the quantized model.
        samples: trajectories, and images from the same noise.
        steps: of DDIM, without clipping.
        guidance_scale: of a conditioned model.
        engines: to compare.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    sampler = SamplerConfig("DDIMScheduler", steps, options={"clip_sample": False})
    pipeline = load_quantized(artifact)
    _, simulated = find_denoiser(pipeline)
    sampling = make_sampling(pipeline, ConditioningConfig(guidance_scale=guidance_scale))
    paths = collect(simulated, sampling, sampler, range(samples), SEED, samples)
    wide = InFloat64(simulated)
    results: dict[str, Any] = {}
    itself = _difference(simulated, wide, sampling, paths, sampler, samples)
    for engine in engines:
        opened = load_quantized(artifact, backend=engine, threads=threads)
        _, denoiser = find_denoiser(opened)
        other = make_sampling(opened, ConditioningConfig(guidance_scale=guidance_scale))
        kernels = denoiser.engine.kernels()  # type: ignore[union-attr, operator]
        check_kernels(kernels, engine)
        results[engine] = {
            **_difference(simulated, denoiser, other, paths, sampler, samples),
            "integer_products": sum(kernel.integer for kernel in kernels),
            "products": len(kernels),
        }
    return {"artifact": str(artifact), "samples": samples, "steps": steps, "float64": itself, "engines": results}


def _difference(
    simulated: nn.Module, denoiser: nn.Module, sampling: Any, paths: Any, sampler: SamplerConfig, samples: int
) -> dict[str, float]:
    """Of a denoiser's predictions along the simulated model's trajectories, and of its images from the same noise."""
    errors = noise_error(simulated, denoiser, paths, samples).relative.tolist()
    images = image_error(sampling.sample(denoiser, sampler, range(samples), SEED), paths.finals)
    return {"median_error": median(errors), "largest_error": max(errors), "psnr": images.psnr}


if __name__ == "__main__":
    run(backends)
