"""Command: measure a model or images, and show what was measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tcaq_lightning.backends.open import is_quantized, open_any
from tcaq_lightning.config import ConditioningConfig, EvaluationConfig, SamplerConfig, TrainerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.evaluate import Evaluation, evaluate_images, planned_samples
from tcaq_lightning.evaluation.evaluate import evaluate as evaluate_models
from tcaq_lightning.evaluation.images import open_images
from tcaq_lightning.evaluation.scores import check_metrics
from tcaq_lightning.models.pipelines import find_denoiser
from tcaq_lightning.models.sampling import make_sampling
from tcaq_lightning.reports.headline import final_table
from tcaq_lightning.runtime.command import at_least, check_seed, check_writable, plain_console, progress_bar
from tcaq_lightning.runtime.distributed.collectives import is_main, on_main
from tcaq_lightning.runtime.distributed.launch import connected
from tcaq_lightning.runtime.extensions import load_extensions
from tcaq_lightning.runtime.files import write_json
from tcaq_lightning.runtime.lightning import choose_device, quiet_lightning

DEFAULTS = EvaluationConfig(num_images=512, fid_samples=5000)
"""What is measured where nothing else is said."""


def evaluate(
    path: str,
    full: str | None = None,
    fid_samples: int | None = None,
    seed: int = 0,
    output: Path | None = None,
    cache: Path | None = None,
    extensions: list[str] | None = None,
    *,
    evaluation: EvaluationConfig = DEFAULTS,
    conditioning: ConditioningConfig,
    trainer: TrainerConfig,
) -> None:
    """Measure FID and other metrics of a model or of images that exist already.

    Beside a full-precision model also the noise error and the same-noise images' MSE and PSNR.

    Args:
        path: quantized artifact, full-precision model in diffusers layout, or name of a shipped model; or images: a
            folder of PNG or other pictures, or an .npz with uint8 `arr_0` (N, H, W, C).
        full: full-precision model to compare with.
        fid_samples: images for the metrics, 0 leaves them out; by default 5000 of a model, all where path is images.
        seed: of the noise.
        output: JSON file for all figures.
        cache: directory for finished batches, so that the same command goes on after it was killed.
        extensions: Python files or modules of your own that register parts, imported first.
        evaluation: metrics, features, reference, sampler.
        conditioning: prompts or classes, and guidance.
        trainer: devices and threads.

    Example:
        python -m tcaq_lightning evaluate runs/quickstart/quantized --full fashion-mnist-ddpm
    """
    at_least(0, 10**7, fid_samples=fid_samples)
    check_seed(seed)
    load_extensions(extensions or [])
    images = _is_images(path)
    number = (0 if images else evaluation.fid_samples) if fid_samples is None else fid_samples
    config = dataclasses.replace(evaluation, fid_samples=number, sampler=evaluation.sampler or SamplerConfig())
    check_metrics(config)
    if images and (full is not None or evaluation.save_images is not None or fid_samples == 0):
        raise UserError(
            f"--full, --save_images and --fid_samples 0 are for models, got images ({path}); leave them out"
        )
    quiet_lightning()
    with connected(trainer):
        if images:
            content, metrics = _measure_images(path, config, trainer, seed, output, cache)
        else:
            content, metrics = _measure_models(path, full, conditioning, config, trainer, seed, output, cache)
        if is_main():
            plain_console().print(final_table({**content, "stages": metrics.seconds}))
        if output is not None:
            on_main(lambda: write_json(output, content))


def _measure_images(
    path: str, config: EvaluationConfig, trainer: TrainerConfig, seed: int, output: Path | None, cache: Path | None
) -> tuple[dict[str, Any], Evaluation]:
    images = open_images(Path(path), "path (no model_index.json, so images)")
    if output is not None:
        check_writable(output)
    with progress_bar(config.fid_samples or len(images)) as advance:
        metrics = evaluate_images(images, config, seed, cache, advance, choose_device(trainer))
    return {"images": path, "seed": seed, **metrics.to_dict()}, metrics


def _measure_models(
    path: str,
    full: str | None,
    conditioning: ConditioningConfig,
    config: EvaluationConfig,
    trainer: TrainerConfig,
    seed: int,
    output: Path | None,
    cache: Path | None,
) -> tuple[dict[str, Any], Evaluation]:
    assert config.sampler is not None
    pipeline = open_any(path)
    models = _models(path, find_denoiser(pipeline)[1], full)
    sampling = make_sampling(pipeline, conditioning)
    if output is not None:
        check_writable(output)
    device = choose_device(trainer)
    pipeline.to(device)
    models = {name: None if m is None else m.to(device) for name, m in models.items()}
    with progress_bar(planned_samples(config, sum(m is not None for m in models.values()))) as advance:
        metrics = evaluate_models(
            **models,
            sampling=sampling,
            calibration_sampler=config.sampler,
            config=config,
            seed=seed,
            cache_dir=cache,
            advance=advance,
        )
    return {"model": path, "compared_with": full, "seed": seed, **metrics.to_dict()}, metrics


def _models(path: str, denoiser: Any, full: str | None) -> dict[str, Any]:
    """The denoisers to measure, `full` and `quantized`; None where there is none."""
    if full is None:
        return {"full": None, "quantized": denoiser} if is_quantized(path) else {"full": denoiser, "quantized": None}
    other = find_denoiser(open_any(full))[1]
    expected, got = _interface(denoiser), _interface(other)
    if got != expected:
        raise UserError(
            f"--full: expected a model like {path}, {expected}, got {got} from {full}; give the model that was "
            "quantized"
        )
    return {"full": other, "quantized": denoiser}


def _interface(denoiser: Any) -> dict[str, Any]:
    """What a denoiser takes and gives, as far as its configuration says."""
    keys = ("in_channels", "out_channels", "sample_size", "cross_attention_dim", "num_class_embeds")
    shapes = {key: denoiser.config[key] for key in keys if denoiser.config.get(key) is not None}
    return {"class": type(denoiser).__name__, **shapes}


def _is_images(path: str) -> bool:
    """Whether a path is meant as images: an .npz, or a directory that holds no model."""
    given = Path(path)
    return given.suffix == ".npz" or (given.is_dir() and not (given / "model_index.json").exists())
