"""Everything that is measured on a quantized denoiser: noise error, same-noise images, FID and the other metrics."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.config import EvaluationConfig, SamplerConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.batches import Batch, Wanted, fingerprint, in_batches
from tcaq_lightning.evaluation.denoiser_errors import ImageError, NoiseError, image_error, noise_error
from tcaq_lightning.evaluation.images import ImageSet, ImageWriter, to_pixels
from tcaq_lightning.evaluation.json_values import finite
from tcaq_lightning.evaluation.scores import check_metrics, score
from tcaq_lightning.evaluation.spaces import FeatureSpace, measure_images, open_space
from tcaq_lightning.models.pipelines import public_config
from tcaq_lightning.models.sampling import Sampling
from tcaq_lightning.models.trajectories import collect
from tcaq_lightning.runtime.distributed.collectives import on_main, share

# Calibration counts its noises from 0. Other seeds would not keep clear of them for certain: torch's CPU generator
# looks at the lower 32 bits of a seed only, and `derive` wraps around there.
HELD_OUT_START = 400_000
"""Number of the first held-out trajectory's noise."""
IMAGES_START = 500_000
"""Number of the first image's noise."""

Advance = Callable[[int], None]
"""Told the number of samples just done."""


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        noise: error of the noise on held-out full-precision trajectories; None without both models.
        images: error of the same-noise images; None without both models.
        num_images: number of same-noise images.
        scores: figures of the metrics, JSON-ready, by `full`, `quantized` or `images` and then by metric; images that
            are not finite have none.
        protocol: what features were compared, JSON-ready; None if none were.
        sampler: sampler of the images, as a dictionary; empty for images from elsewhere.
        seconds: by part, those of samples taken from the cache included.
        full_samples: (num_images, C, H, W) on the CPU, in the model's range; not in `to_dict`.
        quantized_samples: likewise.
    """

    noise: NoiseError | None = None
    images: ImageError | None = None
    num_images: int = 0
    scores: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    protocol: dict[str, Any] | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    full_samples: Tensor | None = field(default=None, repr=False)
    quantized_samples: Tensor | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; None stands for what was not measured or is not finite."""
        noise = images = None
        if self.noise is not None:
            noise = {"summary": self.noise.summary}
            noise |= {key: value.tolist() for key, value in vars(self.noise).items() if value is not None}
        if self.images is not None:
            images = {**dataclasses.asdict(self.images), "num_images": self.num_images}
        values: dict[str, Any] = finite(
            {
                "noise_error": noise,
                "same_noise": images,
                "scores": self.scores,
                "protocol": self.protocol,
                "sampler": self.sampler,
                "seconds": self.seconds,
            }
        )
        return values


@dataclass(frozen=True)
class ImageSampling:
    """How the images of an evaluation are sampled: in the same way with every model.

    Attributes:
        sampling: how the pipeline is sampled.
        sampler: sampler settings.
        seed: the run's seed.
        batch_size: images at a time.
        kept: number of samples to keep as they are.
        measured: number of samples to take features of.
        space: what to take of them, or None.
        cache_dir: where finished batches are kept; None keeps none.
        advance: told the number of samples just done.
    """

    sampling: Sampling
    sampler: SamplerConfig
    seed: int
    batch_size: int
    kept: int
    measured: int
    space: FeatureSpace | None = None
    cache_dir: Path | None = None
    advance: Advance | None = None

    @property
    def key(self) -> list[Any]:
        """JSON-ready: all that determines the samples, beside the model."""
        own = self.sampling.scheduler
        settings = dataclasses.asdict(self.sampler)
        return [settings, type(own).__name__, public_config(own), self.seed, self.batch_size, self.sampling.manifest()]

    @property
    def wanted(self) -> Wanted:
        """Number of images to sample."""
        names = () if self.space is None else self.space.names
        return Wanted(self.kept, 0 if self.space is None else self.measured, names, self.batch_size)


def open_features(config: EvaluationConfig, channels: int) -> FeatureSpace | None:
    """Open the feature extractor and check that everything can be measured, before anything is sampled.

    Args:
        config: which extractor, how many samples.
        channels: of the images.

    Returns:
        None if nothing is to be measured on images.

    Raises:
        UserError: an unknown metric, no such extractor or reference, too few samples, or images that it does not take.
    """
    check_metrics(config)
    if config.fid_samples == 0:
        return None
    space = open_space(config)
    space.check(config, channels, config.fid_samples, "evaluation.fid_samples")
    return space


def planned_samples(config: EvaluationConfig, models: int = 2) -> int:
    """Total number of samples that `evaluate` reports to `advance`.

    Args:
        config: numbers of trajectories and images.
        models: 2 for a comparison, 1 for the metrics of one model.

    >>> planned_samples(EvaluationConfig(num_trajectories=32, num_images=64, fid_samples=100))
    232
    """
    return (
        config.fid_samples if models == 1 else config.num_trajectories + 2 * max(config.num_images, config.fid_samples)
    )


def evaluate(
    full: nn.Module | None,
    quantized: nn.Module | None,
    sampling: Sampling,
    calibration_sampler: SamplerConfig,
    config: EvaluationConfig,
    seed: int,
    cache_dir: Path | None = None,
    advance: Advance | None = None,
) -> Evaluation:
    """Compare a quantized denoiser with the full-precision one; with one of them alone, measure its images only.

    The noise error is taken along the calibration's sampler, images along `config.sampler` where it is given. No noise
    is shared with calibration, and both models' images come from the same noise.

    Args:
        full: full-precision denoiser f, or None.
        quantized: quantized denoiser q, or None.
        sampling: how the pipeline is sampled.
        calibration_sampler: sampler of the held-out trajectories.
        config: what to measure.
        seed: the run's seed.
        cache_dir: where finished batches of images are kept, so that a killed evaluation goes on; None keeps none.
        advance: told the number of samples just done, `planned_samples` in all.

    Raises:
        UserError: an unknown scheduler, extractor or metric, or nothing to measure.
    """
    models = {name: m for name, m in (("full", full), ("quantized", quantized)) if m is not None}
    space = _open(models, sampling, calibration_sampler, config)
    sampler = config.sampler or calibration_sampler
    result = Evaluation(sampler=dataclasses.asdict(sampler), protocol=_protocol(config, space))
    if full is not None and quantized is not None:
        result.num_images = config.num_images
        with _timed(result.seconds, "noise_error"):
            result.noise = _noise_error(full, quantized, sampling, calibration_sampler, config, seed, advance)
    if space is not None and space.lacks_reference(config):
        with _timed(result.seconds, "reference"):
            device = next(next(iter(models.values())).parameters()).device
            space = space.to(device).with_reference_measured(config, cache_dir)
    how = ImageSampling(
        sampling,
        sampler,
        seed,
        config.batch_size,
        result.num_images,
        config.fid_samples,
        space,
        cache_dir,
        advance,
    )
    drawn = {name: sample_images(m, how, _pictures(config, name, models)) for name, m in models.items()}
    result.seconds |= {f"{name}_images": images.seconds for name, images in drawn.items()}
    if space is not None:
        with _timed(result.seconds, "scores"):
            result.scores = _scores({name: images.features for name, images in drawn.items()}, space, config, seed)
    if result.num_images:
        result.full_samples, result.quantized_samples = drawn["full"].samples, drawn["quantized"].samples
        result.images = image_error(result.quantized_samples, result.full_samples)
    return result


def _open(
    models: Mapping[str, nn.Module], sampling: Sampling, calibration_sampler: SamplerConfig, config: EvaluationConfig
) -> FeatureSpace | None:
    """Find mistakes before anything is sampled, and open the networks that look at the images."""
    if not models or (len(models) == 1 and config.fid_samples == 0):
        raise UserError(
            "evaluation.fid_samples is 0 and there is one model only, nothing to measure; "
            "give a full-precision model to compare with or a number of FID samples"
        )
    key = "calibration.sampler" if config.sampler is None else "evaluation.sampler"
    sampling.check_sampler(config.sampler or calibration_sampler, key)
    return open_features(config, sampling.channels(next(iter(models.values()))))


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Note how long the block takes."""
    began = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - began


def _noise_error(
    full: nn.Module,
    quantized: nn.Module,
    sampling: Sampling,
    sampler: SamplerConfig,
    config: EvaluationConfig,
    seed: int,
    advance: Advance | None,
) -> NoiseError:
    """Noise error on held-out trajectories, which the ranks share."""
    held_out = range(HELD_OUT_START, HELD_OUT_START + config.num_trajectories)
    mine = share(held_out)
    paths = collect(full, sampling, sampler, mine, seed, config.batch_size, advance)
    if advance is not None and len(mine) < len(held_out):
        advance(len(held_out) - len(mine))
    return noise_error(full, quantized, paths, config.batch_size)


def evaluate_images(
    images: ImageSet,
    config: EvaluationConfig,
    seed: int,
    cache_dir: Path | None = None,
    advance: Advance | None = None,
    device: torch.device | None = None,
) -> Evaluation:
    """Measure images that are on disk: the first `config.fid_samples` of them, or all if that is 0.

    Args:
        images: in a fixed order.
        config: what to measure.
        seed: of resampling.
        cache_dir: where finished batches of features are kept, so that a killed evaluation goes on.
        advance: told the number of images just done.
        device: of the extractor, by default the CPU.

    Raises:
        UserError: too few images, or something that the metrics need is missing.
    """
    number = config.fid_samples or len(images)
    if number > len(images):
        raise UserError(
            f"evaluation.fid_samples: expected at most the {len(images)} images in {images.path}, got {number}; "
            "take all of them, or generate more"
        )
    space = open_space(config)
    space.check(config, images.shape[0], number, f"the number of images in {images.path}")
    space = space.to(device or torch.device("cpu")).with_reference_measured(config, cache_dir)
    result = Evaluation(protocol=_protocol(config, space))
    with _timed(result.seconds, "images"):
        features = measure_images(images, space, number, config.batch_size, cache_dir, advance)
    with _timed(result.seconds, "scores"):
        result.scores = _scores({"images": features}, space, config, seed)
    return result


def _scores(
    features: dict[str, dict[str, Tensor]], space: FeatureSpace, config: EvaluationConfig, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Metrics by set of images, computed on rank 0, where the features are."""
    reference = space.reference
    found = on_main(lambda: {name: score(name, values, reference, config, seed) for name, values in features.items()})
    return {name: values for name, values in found.items() if values}


def _protocol(config: EvaluationConfig, space: FeatureSpace | None) -> dict[str, Any] | None:
    if space is None:
        return None
    values: dict[str, Any] = {"features": config.features, "checksum": space.checksum, "reference": config.reference}
    return values | {key: getattr(config, key) for metric in check_metrics(config) for key in metric.settings}


def _pictures(config: EvaluationConfig, name: str, models: Mapping[str, Any]) -> Path | None:
    """Where a model's images are written."""
    if config.save_images is None:
        return None
    directory = Path(config.save_images)
    return directory / name if len(models) > 1 else directory


def sample_images(denoiser: nn.Module, how: ImageSampling, pictures: Path | None = None) -> Batch:
    """Sample the images of an evaluation batch by batch; keep the first ones, and the features of those to measure.

    A batch is kept in `how.cache_dir` under a name made of all that determines it, model weights included: another run
    with the same full-precision model finds it too. The batches are dealt to the ranks; rank 0 reads and writes them.

    Args:
        denoiser: the model.
        how: the same for all models.
        pictures: directory for all images as PNG files, or None.
    """
    device = next(denoiser.parameters()).device
    space = None if how.space is None else how.space.to(device)
    directory = writer = None
    if how.cache_dir is not None:
        models = [] if space is None else space.models
        names = [] if space is None else list(space.names)
        directory = how.cache_dir / fingerprint([denoiser, *models], how.key + names)
    if pictures is not None:
        # What is measured on the pictures does not change them.
        source = fingerprint([denoiser], how.key)
        writer = on_main(lambda: ImageWriter(pictures, source))
    wanted = how.wanted

    def draw(start: int) -> Batch:
        began = time.perf_counter()
        indices = range(IMAGES_START + start, IMAGES_START + start + wanted.size(start))
        samples = how.sampling.sample(denoiser, how.sampler, indices, how.seed)
        measure = wanted.size(start, wanted.measured)
        features = space.of_samples(samples[:measure], start) if space is not None and measure else {}
        kept = samples[: wanted.size(start, wanted.kept)].cpu()
        pixels = to_pixels(samples).cpu() if pictures is not None else None
        return Batch(kept, features, time.perf_counter() - began, pixels)

    return in_batches(draw, wanted, directory, writer, how.advance)
