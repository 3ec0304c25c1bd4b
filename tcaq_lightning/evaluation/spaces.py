"""Where images are compared: a feature extractor, CLIP, and real images or their statistics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.config import INCEPTION, EvaluationConfig
from tcaq_lightning.errors import UserError
from tcaq_lightning.evaluation.batches import Batch, Wanted, fingerprint, in_batches
from tcaq_lightning.evaluation.features import (
    REFERENCE_FILE,
    FeatureExtractor,
    extract_features,
    load_feature_extractor,
)
from tcaq_lightning.evaluation.images import ImageSet, to_pixels
from tcaq_lightning.evaluation.inception import Inception, load_inception
from tcaq_lightning.evaluation.metrics.clip import ClipScorer, load_clip
from tcaq_lightning.evaluation.reference import NEEDED, Reference, open_reference
from tcaq_lightning.models.pipelines import shipped
from tcaq_lightning.models.prompts import read_prompts
from tcaq_lightning.runtime.distributed.collectives import on_main
from tcaq_lightning.runtime.hashing import weights_hash

log = logging.getLogger(__name__)

INCEPTION_BATCH = 32
"""Images of 299 x 299 in a forward pass; larger batches are no faster and take gigabytes."""


@dataclass(frozen=True)
class FeatureSpace:
    """What is taken of every image, and what it is compared with.

    Attributes:
        extractor: `Inception` or a `FeatureExtractor`; None for CLIP alone.
        names: of the features that are taken.
        reference: real images.
        clip: scorer of images and prompts, or None.
        checksum: of the extractor's weights, "" without one.
    """

    extractor: Inception | FeatureExtractor | None
    names: tuple[str, ...]
    reference: Reference = field(default_factory=Reference)
    clip: ClipScorer | None = None
    checksum: str = ""

    @property
    def models(self) -> list[nn.Module | None]:
        """For a fingerprint: all that features depend on, beside `key`."""
        return [self.extractor, *([] if self.clip is None else [self.clip])]

    @property
    def key(self) -> list[Any]:
        """For a fingerprint, beside `models`; empty for an own extractor."""
        names = [] if isinstance(self.extractor, FeatureExtractor) and self.clip is None else list(self.names)
        return names + ([] if self.clip is None else self.clip.prompts)

    def to(self, device: torch.device) -> FeatureSpace:
        """Move the networks."""
        for model in self.models:
            if model is not None:
                model.to(device)
        return self

    def of_samples(self, samples: Tensor, start: int) -> dict[str, Tensor]:
        """Features of samples on the CPU, NaN for samples that are not finite.

        Inception and CLIP see the bytes of `to_pixels`; an own extractor sees the samples as they are.

        Args:
            samples: (B, C, H, W) in [-1, 1].
            start: number of the first one.
        """
        if isinstance(self.extractor, FeatureExtractor):
            found = {"features": extract_features(self.extractor, samples).cpu()}
            return found | self._clip_scores(to_pixels(samples), start)
        features = self.of_pixels(to_pixels(samples), start)
        diverged = ~samples.isfinite().flatten(1).all(dim=1).cpu()
        for values in features.values():
            values[diverged] = torch.nan
        return features

    def of_pixels(self, pixels: Tensor, start: int) -> dict[str, Tensor]:
        """Features of pictures on the CPU.

        Args:
            pixels: uint8 (B, C, H, W).
            start: number of the first one.
        """
        found: dict[str, Tensor] = {}
        if isinstance(self.extractor, Inception):
            with torch.no_grad():
                parts = [self.extractor(part)._asdict() for part in torch.split(pixels, INCEPTION_BATCH)]
            taken = {"features": "pool", "spatial": "spatial", "logits": "logits"}
            found = {n: torch.cat([part[taken[n]] for part in parts]).cpu() for n in self.names if n in taken}
        elif self.extractor is not None:
            found = {"features": extract_features(self.extractor, pixels.float() / 127.5 - 1).cpu()}
        return found | self._clip_scores(pixels, start)

    def _clip_scores(self, pixels: Tensor, start: int) -> dict[str, Tensor]:
        return {} if self.clip is None else {"clip": self.clip(pixels, start).cpu()}

    def check(self, config: EvaluationConfig, channels: int, number: int, what: str) -> None:
        """See that images can be measured here.

        Args:
            config: what is measured.
            channels: of the images.
            number: of the images.
            what: they are, for messages.

        Raises:
            UserError: too few of them, or with other channels than the extractor takes.
        """
        if channels != 1 and (channels != 3 or isinstance(self.extractor, FeatureExtractor)):
            kinds = "grey" if isinstance(self.extractor, FeatureExtractor) else "grey or RGB"
            raise UserError(
                f"{what}: features are of {kinds} images, these have {channels} channels; "
                "take another evaluation.features, or set evaluation.fid_samples to 0"
            )
        config.check_number(number, what, config.metrics)
        own = self.extractor if isinstance(self.extractor, FeatureExtractor) and "fid" in config.metrics else None
        if own is not None and number <= own.num_features:
            raise UserError(
                f"{what} must be 0 or more than the {own.num_features} features of {config.features}, got {number}"
            )
        if self.clip is not None and len(self.clip.prompts) < number:
            raise UserError(
                f"evaluation.clip_prompts: expected a prompt for each of {number} images, got "
                f"{len(self.clip.prompts)} in {config.clip_prompts}; write more, or measure fewer images"
            )

    def with_reference_measured(self, config: EvaluationConfig, cache_dir: Path | None = None) -> FeatureSpace:
        """With all that the metrics need of the reference; its images are measured if they have to be.

        Args:
            config: which metrics.
            cache_dir: where finished batches are kept.
        """
        if not self.reference.missing(config.metrics) or self.reference.images is None:
            return self
        images = self.reference.images
        log.info("measuring the %d images of %s", len(images), images.path)
        # Neither logits nor CLIP scores of real images are looked at.
        space = replace(self, names=tuple(n for n in self.names if n not in {"logits", "clip"}), clip=None)
        measured = measure_images(images, space, len(images), config.batch_size, cache_dir)
        return replace(self, reference=self.reference.completed(measured) if measured else Reference())


def measure_images(
    images: ImageSet,
    space: FeatureSpace,
    number: int,
    batch_size: int,
    cache_dir: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Features of images that are on disk, by name, on rank 0.

    Args:
        images: to be read.
        space: what to take of them.
        number: of the images, from the first one.
        batch_size: images at a time.
        cache_dir: where finished batches are kept; None keeps none.
        advance: told the number of images just done.
    """
    directory = None
    if cache_dir is not None:
        directory = cache_dir / fingerprint(space.models, [images.identity, batch_size, space.key])
    model = next(m for m in space.models if m is not None)
    device = next(model.parameters()).device
    wanted = Wanted(kept=0, measured=number, names=space.names, batch_size=batch_size)

    def draw(start: int) -> Batch:
        pixels = images.read(range(start, start + wanted.size(start)))
        return Batch(torch.zeros(0), space.of_pixels(pixels.to(device), start), 0.0)

    return in_batches(draw, wanted, directory, None, advance).features


def write_statistics(
    images: ImageSet,
    output: Path,
    config: EvaluationConfig,
    num_features: int,
    cache_dir: Path | None = None,
    advance: Callable[[int], None] | None = None,
    device: torch.device | None = None,
) -> None:
    """Measure real images and write what `open_reference` reads.

    Args:
        images: all of them are measured.
        output: the .safetensors file.
        config: which extractor, and the batch size.
        num_features: images whose features are kept too.
        cache_dir, advance: as in `measure_images`.
        device: of the extractor, by default the CPU.

    Raises:
        UserError: no such extractor, or images that it does not take or that are too few.
    """
    extractor, _ = load_extractor(config)
    _check_channels(extractor, images, "images")
    if len(images) < 2:
        raise UserError(f"images: expected at least 2 in {images.path} for a covariance, got {len(images)}; give more")
    names = ("features", "spatial") if config.features == INCEPTION else ("features",)
    space = FeatureSpace(extractor, names).to(device or torch.device("cpu"))
    digest = weights_hash(extractor, digits=16)
    measured = measure_images(images, space, len(images), config.batch_size, cache_dir, advance)
    on_main(lambda: Reference().completed(measured).save(output, num_features, config.features, digest))


def load_extractor(config: EvaluationConfig) -> tuple[Inception | FeatureExtractor, Path | None]:
    """The feature extractor, and the reference that comes with it.

    Raises:
        UserError: there is no such extractor.
    """
    if config.features == INCEPTION:
        return load_inception(None if config.inception_weights is None else Path(config.inception_weights)), None
    directory = shipped(config.features) or Path(config.features)
    return load_feature_extractor(directory), directory / REFERENCE_FILE


def open_space(config: EvaluationConfig) -> FeatureSpace:
    """Open all that the metrics need, before anything is sampled.

    Args:
        config: which metrics.

    Raises:
        UserError: something is missing, or does not fit the rest.
    """
    clip = None
    if "clip" in config.metrics:
        assert config.clip_model is not None
        assert config.clip_prompts is not None
        clip = load_clip(config.clip_model, read_prompts(Path(config.clip_prompts), "evaluation.clip_prompts"))
    if config.metrics == ["clip"]:
        return FeatureSpace(None, ("clip",), clip=clip)
    extractor, own = load_extractor(config)
    digest = weights_hash(extractor, digits=16)
    compared = [m for m in config.metrics if m in NEEDED]
    path = own if config.reference is None else Path(config.reference)
    if compared and path is None:
        raise UserError(
            f"evaluation.reference must be given for {', '.join(compared)} with evaluation.features {INCEPTION}, "
            "got null; give a folder of images, an .npz, or statistics"
        )
    reference = Reference()
    if compared and path is not None:
        reference = open_reference(path, compared, extractor.num_features, digest)
        known = reference.features if reference.features is not None else reference.images
        if known is not None:
            config.check_number(len(known), f"the number of images in {path} (evaluation.reference)", compared)
        if reference.images is not None:
            _check_channels(extractor, reference.images, "evaluation.reference")
    return FeatureSpace(extractor, feature_names(config.metrics), reference, clip, digest)


def _check_channels(extractor: nn.Module, images: ImageSet, key: str) -> None:
    if isinstance(extractor, FeatureExtractor) and images.shape[0] != 1:
        raise UserError(
            f"{key}: expected grey images, as evaluation.features takes them, got {images.shape[0]} "
            f"channels in {images.path}; give grey ones or evaluation.features {INCEPTION}"
        )


def feature_names(metrics: Collection[str]) -> tuple[str, ...]:
    """Features that metrics are computed from.

    >>> feature_names(["is", "kid"])
    ('features', 'logits')
    """
    further = {"sfid": "spatial", "is": "logits", "clip": "clip"}
    return ("features", *(name for metric, name in further.items() if metric in metrics))
