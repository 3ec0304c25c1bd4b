"""Everything that is measured on a quantized denoiser: noise error, same-noise images, FID."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.config import EvaluationConfig, SamplerConfig
from tcaq_lightning.distributed import gather, on_main, rank, share, world_size
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.features import (
    REFERENCE_FILE,
    FeatureExtractor,
    extract_features,
    load_feature_extractor,
)
from tcaq_lightning.evaluation.fid import FIDResult, ReferenceStatistics, frechet_distance
from tcaq_lightning.evaluation.metrics import ImageError, NoiseError, image_error, noise_error
from tcaq_lightning.files import DamagedFileError, load_tensors, save_tensors
from tcaq_lightning.pipelines import shipped
from tcaq_lightning.sampling import Sampling
from tcaq_lightning.timesteps import TimestepGroups
from tcaq_lightning.trajectories import collect

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
        sampler: sampler of the images, as a dictionary.
        seconds: by part, those of samples taken from the cache included.
        full_samples, quantized_samples: (num_images, C, H, W) on the CPU, in the model's range; not in `to_dict`.
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; None stands for what was not measured or is not finite."""
        noise = images = None
        if self.noise is not None:
            lists = {f.name: getattr(self.noise, f.name).tolist() for f in dataclasses.fields(self.noise)}
            noise = {"summary": self.noise.summary, **lists}
        if self.images is not None:
            images = {"mse": self.images.mse, "psnr": self.images.psnr, "num_images": self.num_images}
        fid = {"full": self.fid_full, "quantized": self.fid_quantized}
        values: dict[str, Any] = finite(
            {
                "noise_error": noise,
                "same_noise": images,
                "fid": {k: None if v is None else dataclasses.asdict(v) for k, v in fid.items()},
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


@dataclass(frozen=True)
class FeatureSpace:
    """Where FID is measured."""

    extractor: FeatureExtractor
    reference: ReferenceStatistics


def open_features(config: EvaluationConfig, channels: int) -> FeatureSpace | None:
    """Open the feature extractor and see that FID can be measured, before anything is sampled.

    Args:
        config: which extractor, how many samples.
        channels: of the images.

    Returns:
        None if FID is not asked for.

    Raises:
        UserError: no such extractor, too few samples, or images that it does not take.
    """
    if config.fid_samples == 0:
        return None
    if channels != 1:
        raise UserError(
            f"evaluation.fid_samples: features are of grey images, the model's have {channels} channels; "
            "set evaluation.fid_samples to 0"
        )
    directory = shipped(config.features) or Path(config.features)
    extractor = load_feature_extractor(directory)
    if config.fid_samples <= extractor.num_features:
        raise UserError(
            f"evaluation.fid_samples must be 0 or more than the {extractor.num_features} features of "
            f"{config.features}, got {config.fid_samples}"
        )
    return FeatureSpace(extractor, ReferenceStatistics.load(directory / REFERENCE_FILE))


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
    sampling.check(next(iter(models.values())), sampler, key)
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
    kept = config.num_images if len(models) == 2 else 0
    drawn = {}
    for name, model in models.items():
        drawn[name] = sample_images(model, sampling, sampler, config, kept, space, seed, cache_dir, advance)
        seconds[f"{name}_images"] = drawn[name].seconds
    began = time.perf_counter()
    fids = on_main(lambda: {name: _fid(name, images.features, space, seed) for name, images in drawn.items()})
    seconds["fid"] = time.perf_counter() - began
    samples = {name: images.samples for name, images in drawn.items()} if kept else {}
    return Metrics(
        noise=noise,
        images=image_error(samples["quantized"], samples["full"]) if kept else None,
        num_images=kept,
        fid_full=fids.get("full"),
        fid_quantized=fids.get("quantized"),
        sampler=dataclasses.asdict(sampler),
        seconds=seconds,
        full_samples=samples.get("full"),
        quantized_samples=samples.get("quantized"),
    )


def _fid(name: str, features: Tensor, space: FeatureSpace | None, seed: int) -> FIDResult | None:
    if space is None:
        return None
    if not features.isfinite().all():
        log.warning("no FID of the %s model: some of its images are NaN, its sampling diverged", name)
        return None
    return frechet_distance(features, space.reference, seed=seed)


@dataclass
class SampledImages:
    """Images of one model.

    Attributes:
        samples: (num_kept, C, H, W) the first ones, in the model's range.
        features: (fid_samples, F), or (0, 0) without FID.
        seconds: spent on sampling and features, also by the process that filled the cache.
    """

    samples: Tensor
    features: Tensor
    seconds: float


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
) -> SampledImages:
    """Sample the images of an evaluation batch by batch, keeping the first ones and the features of those for FID.

    A batch is kept in `cache_dir` under a name made of all that determines it, model weights included: another run
    with the same full-precision model finds it too. The batches are dealt to the ranks; rank 0 reads and writes them.

    Args:
        denoiser: the model.
        sampling: how the pipeline is sampled.
        sampler: sampler settings.
        config: number of FID samples and batch size.
        num_kept: number of samples to keep as they are.
        space: feature extractor, or None.
        seed: the run's seed.
        cache_dir: as in `evaluate`.
        advance: as in `evaluate`.
    """
    num_features = 0 if space is None else config.fid_samples
    device = next(denoiser.parameters()).device
    extractor = None if space is None else space.extractor.to(device)
    directory = None
    if cache_dir is not None:
        own = sampling.scheduler
        schedule = {k: v for k, v in own.config.items() if not k.startswith("_")}  # paths and versions aside
        key = [dataclasses.asdict(sampler), type(own).__name__, schedule, seed, config.batch_size, sampling.manifest()]
        directory = cache_dir / _fingerprint(denoiser, extractor, key)
    total = max(num_kept, num_features)
    starts = range(0, total, config.batch_size)

    def size(start: int, limit: int = total) -> int:
        return max(0, min(start + config.batch_size, limit) - start)

    def path(start: int) -> Path | None:
        return None if directory is None else directory / f"{start:06d}.safetensors"

    def draw(start: int) -> SampledImages:
        began = time.perf_counter()
        indices = range(IMAGES_START + start, IMAGES_START + start + size(start))
        samples = sampling.sample(denoiser, sampler, indices, seed)
        measure = size(start, num_features)
        features = extract_features(extractor, samples[:measure]) if extractor and measure else torch.zeros(0, 0)
        kept = samples[: size(start, num_kept)]
        return SampledImages(kept.cpu(), features.cpu(), time.perf_counter() - began)

    def done(start: int) -> None:
        if advance is not None:
            advance(size(start))

    found = on_main(lambda: [_read_batch(path(s), size(s, num_kept), size(s, num_features)) for s in starts])
    batches = {start: SampledImages(**values) for start, values in zip(starts, found, strict=True) if values}
    for start in batches:
        done(start)
    missing = [start for start in starts if start not in batches]
    for first in range(0, len(missing), world_size()):
        dealt = missing[first : first + world_size()]  # one batch for each rank
        drawn = gather(vars(draw(dealt[rank()])) if rank() < len(dealt) else {})
        for start, values in zip(dealt, drawn[: len(dealt)], strict=True):
            batches[start] = batch = SampledImages(**values)
            on_main(partial(_write_batch, path(start), batch))
            done(start)
    ordered = [batches[start] for start in starts]
    return SampledImages(
        torch.cat([b.samples for b in ordered]),
        torch.cat([b.features for b in ordered if len(b.features)] or [torch.zeros(0, 0)]),
        sum(b.seconds for b in ordered),
    )


def _write_batch(path: Path | None, batch: SampledImages) -> None:
    if path is not None:
        save_tensors(path, {"samples": batch.samples, "features": batch.features}, {"seconds": batch.seconds})


def _read_batch(path: Path | None, keep: int, measure: int) -> dict[str, Any] | None:
    """Fields of a batch in the cache; None if it is missing, damaged, or holds other numbers of samples or features."""
    if path is None or not path.exists():
        return None
    try:
        tensors, record = load_tensors(path)
    except DamagedFileError as error:
        log.warning("%s; sampling this batch again", error)
        return None
    samples, features = tensors["samples"], tensors["features"]
    if len(samples) != keep or len(features) != measure:
        return None
    return {"samples": samples, "features": features, "seconds": float(record["seconds"])}


def _fingerprint(denoiser: nn.Module, extractor: nn.Module | None, key: Any) -> str:
    """Name for everything that determines a model's images and their features."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode())
    for model in (denoiser, extractor):
        if model is None:
            continue
        for name, module in model.named_modules():
            # Bits, kinds and timestep groups are plain attributes, in no state dict.
            settings = {k: str(v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, Enum))}
            groups = getattr(module, "groups", None)
            boundaries = groups.boundaries if isinstance(groups, TimestepGroups) else None
            digest.update(json.dumps([name, type(module).__name__, settings, boundaries], sort_keys=True).encode())
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:20]
