"""Everything that is measured on a quantized denoiser: noise error, same-noise images, FID and the other metrics."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
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
from tcaq_lightning.evaluation.metrics.fid import FIDResult
from tcaq_lightning.evaluation.scores import plain, score
from tcaq_lightning.evaluation.spaces import FeatureSpace, measure_images, open_space
from tcaq_lightning.models.sampling import Sampling
from tcaq_lightning.models.trajectories import collect
from tcaq_lightning.runtime.distributed.collectives import on_main, share

log = logging.getLogger(__name__)

# Calibration counts its noises from 0. Other seeds would not keep clear of them for certain: torch's CPU generator
# looks at the lower 32 bits of a seed only, and seed * SEED_STRIDE + index wraps around there.
HELD_OUT_START = 400_000
"""Number of the first held-out trajectory's noise."""
IMAGES_START = 500_000
"""Number of the first image's noise."""


@dataclass
class Metrics:
    """What was measured.

    Attributes:
        noise: error of the noise on held-out full-precision trajectories; None without both models.
        images: error of the same-noise images; None without both models.
        num_images: number of same-noise images.
        fid_full, fid_quantized: FID of either model's images; None if not asked for or not finite.
        sampler: sampler of the images, as a dictionary; empty for images from elsewhere.
        seconds: by part, those of samples taken from the cache included.
        full_samples, quantized_samples: (num_images, C, H, W) on the CPU, in the model's range; not in `to_dict`.
        fid_images: FID of images from elsewhere.
        scores: the other metrics, by `full`, `quantized` or `images` and then by name.
        protocol: what features were compared, JSON-ready; None if none were.
    """

    noise: NoiseError | None
    images: ImageError | None
    num_images: int
    fid_full: FIDResult | None
    fid_quantized: FIDResult | None
    sampler: dict[str, Any]
    seconds: dict[str, float]
    full_samples: Tensor | None = field(default=None, repr=False)
    quantized_samples: Tensor | None = field(default=None, repr=False)
    fid_images: FIDResult | None = None
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    protocol: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; None stands for what was not measured or is not finite."""
        noise = images = None
        if self.noise is not None:
            lists = {f.name: getattr(self.noise, f.name).tolist() for f in dataclasses.fields(self.noise)}
            noise = {"summary": self.noise.summary, **lists}
        if self.images is not None:
            images = {"mse": self.images.mse, "psnr": self.images.psnr, "num_images": self.num_images}
        fid = {"full": self.fid_full, "quantized": self.fid_quantized}
        fid |= {"images": self.fid_images} if self.fid_images is not None else {}
        values: dict[str, Any] = finite(
            {
                "noise_error": noise,
                "same_noise": images,
                "fid": {k: None if v is None else dataclasses.asdict(v) for k, v in fid.items()},
                "scores": self.scores,
                "protocol": self.protocol,
                "sampler": self.sampler,
                "seconds": self.seconds,
            }
        )
        return values


def finite(value: Any) -> Any:
    """The same JSON-ready values with None for NaN and infinity, which JSON has not.

    >>> finite({"mse": [0.5, float("inf")]})
    {'mse': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_features(config: EvaluationConfig, channels: int) -> FeatureSpace | None:
    """Open the feature extractor and see that all can be measured, before anything is sampled.

    Args:
        config: which extractor, how many samples.
        channels: of the images.

    Returns:
        None if nothing is to be measured on images.

    Raises:
        UserError: no such extractor or reference, too few samples, or images that it does not take.
    """
    if config.fid_samples == 0:
        return None
    space = open_space(config)
    space.check(config, channels, config.fid_samples, "evaluation.fid_samples")
    return space


def planned_samples(config: EvaluationConfig, models: int = 2) -> int:
    """How many samples `evaluate` tells `advance` of, in all.

    Args:
        config: numbers of trajectories and images.
        models: 2 for a comparison, 1 for the FID of one model.

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
    advance: Callable[[int], None] | None = None,
) -> Metrics:
    """Compare a quantized denoiser with the full-precision one; with one of them alone, measure its FID only.

    The noise error is taken along the calibration's sampler, images and FID along `config.sampler` where it is given.
    No noise is shared with calibration, and both models' images come from the same noise.

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
        UserError: an unknown scheduler or extractor, or nothing to measure.
    """
    models = {name: m for name, m in (("full", full), ("quantized", quantized)) if m is not None}
    if not models or (len(models) == 1 and config.fid_samples == 0):
        raise UserError(
            "evaluation.fid_samples is 0 and there is one model only, nothing to measure; "
            "give a full-precision model to compare with or a number of FID samples"
        )
    sampler = config.sampler or calibration_sampler
    key = "calibration.sampler" if config.sampler is None else "evaluation.sampler"
    sampling.check_sampler(sampler, key)
    space = open_features(config, sampling.channels(next(iter(models.values()))))
    seconds: dict[str, float] = {}
    noise = None
    if full is not None and quantized is not None:
        began = time.perf_counter()
        held_out = range(HELD_OUT_START, HELD_OUT_START + config.num_trajectories)
        mine = share(held_out)
        paths = collect(full, sampling, calibration_sampler, mine, seed, config.batch_size, advance)
        if advance is not None and len(mine) < len(held_out):
            advance(len(held_out) - len(mine))
        noise = noise_error(full, quantized, paths, config.batch_size)
        seconds["noise_error"] = time.perf_counter() - began
    if space is not None and space.reference.missing(config.metrics):
        began = time.perf_counter()
        device = next(next(iter(models.values())).parameters()).device
        space = space.to(device).with_reference_measured(config, cache_dir)
        seconds["reference"] = time.perf_counter() - began
    kept = config.num_images if len(models) == 2 else 0
    drawn = {}
    for name, model in models.items():
        drawn[name] = sample_images(
            model, sampling, sampler, config, kept, space, seed, cache_dir, advance, _pictures(config, name, models)
        )
        seconds[f"{name}_images"] = drawn[name].seconds
    began = time.perf_counter()
    scores = _scores({name: images.features for name, images in drawn.items()}, space, config, seed)
    seconds["fid"] = time.perf_counter() - began
    samples = {name: images.samples for name, images in drawn.items()} if kept else {}
    return Metrics(
        noise=noise,
        images=image_error(samples["quantized"], samples["full"]) if kept else None,
        num_images=kept,
        fid_full=scores.get("full", {}).pop("fid", None),
        fid_quantized=scores.get("quantized", {}).pop("fid", None),
        sampler=dataclasses.asdict(sampler),
        seconds=seconds,
        full_samples=samples.get("full"),
        quantized_samples=samples.get("quantized"),
        scores={name: plain(values) for name, values in scores.items() if values},
        protocol=_protocol(config, space),
    )


def evaluate_images(
    images: ImageSet,
    config: EvaluationConfig,
    seed: int,
    cache_dir: Path | None = None,
    advance: Callable[[int], None] | None = None,
    device: torch.device | None = None,
) -> Metrics:
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
    began = time.perf_counter()
    features = measure_images(images, space, number, config.batch_size, cache_dir, advance)
    measured = time.perf_counter()
    scores = _scores({"images": features}, space, config, seed)
    seconds = {"images": measured - began, "fid": time.perf_counter() - measured}
    fid = scores.get("images", {}).pop("fid", None)
    return Metrics(
        noise=None,
        images=None,
        num_images=0,
        fid_full=None,
        fid_quantized=None,
        sampler={},
        seconds=seconds,
        fid_images=fid,
        scores={name: plain(values) for name, values in scores.items() if values},
        protocol=_protocol(config, space),
    )


def _scores(
    features: dict[str, dict[str, Tensor]], space: FeatureSpace | None, config: EvaluationConfig, seed: int
) -> dict[str, dict[str, Any]]:
    """Metrics by set of images, computed on rank 0, where the features are."""
    if space is None:
        return {}
    reference = space.reference
    return on_main(lambda: {name: score(name, values, reference, config, seed) for name, values in features.items()})


def _protocol(config: EvaluationConfig, space: FeatureSpace | None) -> dict[str, Any] | None:
    if space is None:
        return None
    values: dict[str, Any] = {"features": config.features, "checksum": space.checksum, "reference": config.reference}
    return values | ({"clip_model": config.clip_model} if space.clip is not None else {})


def _pictures(config: EvaluationConfig, name: str, models: Mapping[str, Any]) -> Path | None:
    """Where a model's images are written."""
    if config.save_images is None:
        return None
    directory = Path(config.save_images)
    return directory / name if len(models) > 1 else directory


def sample_images(
    denoiser: nn.Module,
    sampling: Sampling,
    sampler: SamplerConfig,
    config: EvaluationConfig,
    num_kept: int,
    space: FeatureSpace | None,
    seed: int,
    cache_dir: Path | None = None,
    advance: Callable[[int], None] | None = None,
    pictures: Path | None = None,
) -> Batch:
    """Sample the images of an evaluation batch by batch, keeping the first ones and the features of those for FID.

    A batch is kept in `cache_dir` under a name made of all that determines it, model weights included: another run
    with the same full-precision model finds it too. The batches are dealt to the ranks; rank 0 reads and writes them.

    Args:
        denoiser: the model.
        sampling: how the pipeline is sampled.
        sampler: sampler settings.
        config: number of FID samples and batch size.
        num_kept: number of samples to keep as they are.
        space: what to take of the images, or None.
        seed: the run's seed.
        cache_dir: as in `evaluate`.
        advance: as in `evaluate`.
        pictures: directory for all images as PNG files, or None.
    """
    device = next(denoiser.parameters()).device
    models = [None] if space is None else space.to(device).models
    own = sampling.scheduler
    schedule = {k: v for k, v in own.config.items() if not k.startswith("_")}  # paths and versions aside
    drawn = [dataclasses.asdict(sampler), type(own).__name__, schedule, seed, config.batch_size, sampling.manifest()]
    key = list(drawn)
    if space is not None:
        key += space.key
    directory = writer = None
    if cache_dir is not None:
        directory = cache_dir / fingerprint([denoiser, *models], key)
    if pictures is not None:
        # What is measured on the pictures does not change them.
        source = fingerprint([denoiser], drawn)
        writer = on_main(lambda: ImageWriter(pictures, source))
    wanted = Wanted(
        kept=num_kept,
        measured=0 if space is None else config.fid_samples,
        names=() if space is None else space.names,
        batch_size=config.batch_size,
    )

    def draw(start: int) -> Batch:
        began = time.perf_counter()
        indices = range(IMAGES_START + start, IMAGES_START + start + wanted.size(start))
        samples = sampling.sample(denoiser, sampler, indices, seed)
        measure = wanted.size(start, wanted.measured)
        features = space.of_samples(samples[:measure], start) if space is not None and measure else {}
        kept = samples[: wanted.size(start, num_kept)].cpu()
        pixels = to_pixels(samples).cpu() if pictures is not None else None
        return Batch(kept, features, time.perf_counter() - began, pixels)

    return in_batches(draw, wanted, directory, writer, advance)
