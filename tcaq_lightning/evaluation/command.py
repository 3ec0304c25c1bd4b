"""Commands: sample images, and compute the statistics of real ones."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from tcaq_lightning.backends.open import open_any
from tcaq_lightning.config import ConditioningConfig, EvaluationConfig, SamplerConfig, TrainerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.grid import save_images
from tcaq_lightning.evaluation.images import open_images
from tcaq_lightning.evaluation.spaces import write_statistics
from tcaq_lightning.models.pipelines import find_denoiser, to_images
from tcaq_lightning.models.sampling import make_sampling
from tcaq_lightning.runtime.command import at_least, check_seed, check_writable, progress_bar, set_threads
from tcaq_lightning.runtime.distributed.launch import connected
from tcaq_lightning.runtime.extensions import load_extensions
from tcaq_lightning.runtime.lightning import choose_device, quiet_lightning


def sample(
    path: str,
    num: int = 64,
    output: Path = Path("grid.png"),
    backend: str = "torch",
    seed: int = 0,
    batch_size: int = 64,
    threads: int | None = None,
    extensions: list[str] | None = None,
    *,
    sampler: SamplerConfig,
    conditioning: ConditioningConfig,
) -> None:
    """Sample images and write them as one PNG.

    Args:
        path: quantized artifact, full-precision model in diffusers layout, or name of a shipped model.
        num: number of images.
        output: PNG file.
        backend: what runs the denoiser of an artifact, such as torch, openvino or onnxruntime.
        seed: of the noise; image i is the same for any num and batch_size.
        batch_size: images at a time.
        threads: CPU threads; without it, PyTorch's choice.
        extensions: Python files or modules of your own that register parts, imported first.
        sampler: scheduler, steps and their settings.
        conditioning: prompts or classes, and guidance.

    Example:
        python -m tcaq_lightning sample runs/quickstart/quantized --num_steps 50 --output grid.png
    """
    at_least(1, 100_000, num=num)
    at_least(1, 2**20, batch_size=batch_size)
    check_seed(seed)
    sampler.check("sampler")
    load_extensions(extensions or [])
    set_threads(threads)
    pipeline = open_any(path, backend)
    _, denoiser = find_denoiser(pipeline)
    sampling = make_sampling(pipeline, conditioning)
    sampling.check(denoiser, sampler, "sampler")
    check_writable(output)
    parts = []
    with progress_bar(num) as advance:
        for start in range(0, num, batch_size):
            indices = range(start, min(start + batch_size, num))
            parts.append(sampling.sample(denoiser, sampler, indices, seed).cpu())
            advance(len(indices))
    save_images(to_images(torch.cat(parts)), output, columns=math.ceil(math.sqrt(num)))


def statistics(
    images: Path,
    output: Path,
    features: str = "inception",
    inception_weights: str | None = None,
    num_features: int = 10_000,
    batch_size: int = 64,
    cache: Path | None = None,
    extensions: list[str] | None = None,
    *,
    trainer: TrainerConfig,
) -> None:
    """Compute the statistics of real images that evaluate --reference compares with, once for all evaluations.

    Args:
        images: folder of pictures, or .npz with uint8 `arr_0` (N, H, W, C).
        output: .safetensors file.
        features: feature extractor: inception, a directory, or the name of a shipped one.
        inception_weights: torch-fidelity's weights of Inception v3; without it, its file in torch hub's cache.
        num_features: images whose features are kept too, for kid and precision_recall; evenly spaced over all.
        batch_size: images at a time.
        cache: directory for finished batches, so that the same command goes on after it was killed.
        extensions: Python files or modules of your own that register parts, imported first.
        trainer: devices and threads.

    Example:
        python -m tcaq_lightning statistics REAL_IMAGES reference.safetensors --cache cache --devices 2
    """
    at_least(1, 2**20, batch_size=batch_size)
    at_least(0, num_features=num_features)
    if output.suffix != ".safetensors":
        raise UserError(f"output: expected a name that ends in .safetensors, got {output}; give such a name")
    load_extensions(extensions or [])
    quiet_lightning()
    config = EvaluationConfig(features=features, inception_weights=inception_weights, batch_size=batch_size)
    with connected(trainer):
        found = open_images(images, "images")
        check_writable(output)
        with progress_bar(len(found)) as advance:
            write_statistics(found, output, config, num_features, cache, advance, choose_device(trainer))
