"""Whether an engine computes the artifact: its error against the simulated model along trajectories, and its images.

python -m benchmarks.backends --artifact runs/fashion_mnist_w4a8/quantized
python -m benchmarks.backends --artifact runs/fashion_mnist_latent_w4a8/quantized --guidance_scale 2
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.common import median, run
from tcaq_lightning.artifact import load_quantized
from tcaq_lightning.config import ConditioningConfig, SamplerConfig
from tcaq_lightning.evaluation.metrics import image_error, noise_error
from tcaq_lightning.pipelines import find_denoiser
from tcaq_lightning.sampling import make_sampling
from tcaq_lightning.trajectories import collect

SEED = 7


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
    results: dict[str, Any] = {}
    for engine in engines:
        opened = load_quantized(artifact, backend=engine, threads=threads)
        _, denoiser = find_denoiser(opened)
        errors = noise_error(simulated, denoiser, paths, samples).relative.tolist()
        other = make_sampling(opened, ConditioningConfig(guidance_scale=guidance_scale))
        images = image_error(other.sample(denoiser, sampler, range(samples), SEED), paths.finals)
        kernels = denoiser.engine.kernels()  # type: ignore[union-attr, operator]
        results[engine] = {
            "median_error": median(errors),
            "largest_error": max(errors),
            "psnr": images.psnr,
            "integer_products": sum(kernel.integer for kernel in kernels),
            "products": len(kernels),
        }
    return {"artifact": str(artifact), "samples": samples, "steps": steps, "engines": results}


if __name__ == "__main__":
    run(backends)
