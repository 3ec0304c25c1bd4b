"""Where images are compared: a feature extractor, the networks of metrics, and real images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

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
from tcaq_lightning.evaluation.metrics.base import Metric
from tcaq_lightning.evaluation.reference import PARTS, Reference, open_reference
from tcaq_lightning.evaluation.scores import check_metrics, feature_names
from tcaq_lightning.models.pipelines import shipped
from tcaq_lightning.runtime.distributed.collectives import on_main
from tcaq_lightning.runtime.hashing import path_hash, weights_hash

log = logging.getLogger(__name__)

MEASURED_AS = {"statistics": "pooled", "spatial": "spatial", "features": "pooled"}
"""Which features a part of a reference is made of."""
INCEPTION_BATCH = 32
"""Images of 299 x 299 in a forward pass; larger batches are no faster and take gigabytes."""


@dataclass(frozen=True)
class FeatureSpace:
    """What is taken of every image, and what it is compared with.

    Attributes:
        extractor: `Inception` or a `FeatureExtractor`; None where no metric needs its features.
        features: names of the extractor's features that are taken.
        reference: real images.
        per_image: by metric, what looks at each image by itself.
        checksum: of the extractor's weights, "" without one.
    """

    extractor: Inception | FeatureExtractor | None
    features: tuple[str, ...]
    reference: Reference = field(default_factory=Reference)
    per_image: Mapping[str, nn.Module] = field(default_factory=dict)
    checksum: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all that is taken of an image."""
        return (*self.features, *self.per_image)

    @property
    def models(self) -> list[nn.Module]:
        """All that looks at images, the extractor first."""
        return [model for model in (self.extractor, *self.per_image.values()) if model is not None]

    @property
    def device(self) -> torch.device:
        """Of the networks; the CPU where there are none."""
        parameters = (p for model in self.models for p in model.parameters())
        return next((p.device for p in parameters), torch.device("cpu"))

    def to(self, device: torch.device) -> FeatureSpace:
        """Move the networks."""
        for model in self.models:
            model.to(device)
        return self

    def of_samples(self, samples: Tensor, start: int) -> dict[str, Tensor]:
        """Features of samples on the CPU, NaN for samples that are not finite.

        An extractor of one's own sees the samples as they are, everything else the bytes of `to_pixels`.

        Args:
            samples: (B, C, H, W) in [-1, 1].
            start: number of the first one.
        """
        if isinstance(self.extractor, FeatureExtractor):
            found = {"pooled": extract_features(self.extractor, samples).cpu()}
            found |= self._by_metrics(to_pixels(samples), start)
        else:
            found = self.of_pixels(to_pixels(samples), start)
        diverged = ~samples.isfinite().flatten(1).all(dim=1).cpu()
        for values in found.values():
            values[diverged] = torch.nan
        return found

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
            found = {name: torch.cat([part[name] for part in parts]).cpu() for name in self.features}
        elif self.extractor is not None:
            found = {"pooled": extract_features(self.extractor, pixels.float() / 127.5 - 1).cpu()}
        return found | self._by_metrics(pixels, start)

    def _by_metrics(self, pixels: Tensor, start: int) -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: look(pixels, start).cpu() for name, look in self.per_image.items()}

    def check(self, config: EvaluationConfig, channels: int, number: int, what: str) -> None:
        """Check that images can be measured here.

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
        width = 0 if self.extractor is None else self.extractor.num_features
        for metric in check_metrics(config):
            metric.check_number(number, what, config, width)

    def lacks_reference(self, config: EvaluationConfig) -> bool:
        """Whether the metrics need more of the reference than is known."""
        parts = {part for metric in check_metrics(config) for part in metric.reference_needs}
        return bool(self.reference.missing(parts))

    def with_reference_measured(self, config: EvaluationConfig, cache_dir: Path | None = None) -> FeatureSpace:
        """With all that the metrics need of the reference; its images are measured if they have to be.

        Args:
            config: which metrics.
            cache_dir: where finished batches are kept.
        """
        if not self.lacks_reference(config) or self.reference.images is None:
            return self
        images = self.reference.images
        log.info("measuring the %d images of %s", len(images), images.path)
        parts = {part for metric in check_metrics(config) for part in metric.reference_needs}
        names = tuple(dict.fromkeys(MEASURED_AS[part] for part in PARTS if part in parts))
        space = replace(self, features=names, per_image={})
        measured = measure_images(images, space, len(images), config.batch_size, cache_dir)
        return replace(self, reference=self.reference.completed(measured) if measured else Reference())


def evaluation_hashes(config: EvaluationConfig, space: FeatureSpace | None) -> dict[str, str]:
    """Hashes of what an evaluation reads, by the key that names it.

    Args:
        config: what is measured.
        space: as `open_space` gives it; None where nothing is measured on images.
    """
    if space is None:
        return {}
    found = {"features": space.checksum[:20]} if space.checksum else {}
    for key in ("reference", "clip_model", "clip_prompts"):
        path = getattr(config, key)
        if path is not None and Path(path).exists():
            found[key] = path_hash(Path(path))
    return found


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
        directory = cache_dir / fingerprint(space.models, [images.identity, batch_size, space.names])
    wanted = Wanted(kept=0, measured=number, names=space.names, batch_size=batch_size)

    def draw(start: int) -> Batch:
        pixels = images.read(range(start, start + wanted.size(start)))
        return Batch(torch.zeros(0), space.of_pixels(pixels.to(space.device), start), 0.0)

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
        cache_dir: as in `measure_images`.
        advance: as in `measure_images`.
        device: of the extractor, by default the CPU.

    Raises:
        UserError: no such extractor, or images that it does not take or that are too few.
    """
    extractor, _ = load_extractor(config)
    _check_channels(extractor, images, "images")
    if len(images) < 2:
        raise UserError(f"images: expected at least 2 in {images.path} for a covariance, got {len(images)}; give more")
    names = ("pooled", "spatial") if config.features == INCEPTION else ("pooled",)
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
    metrics = check_metrics(config)
    looks = {metric.name: metric.per_image(config) for metric in metrics}
    per_image = {name: look.eval().requires_grad_(False) for name, look in looks.items() if look is not None}
    features = feature_names(metrics)
    if not features and not any(metric.reference_needs for metric in metrics):
        return FeatureSpace(None, (), per_image=per_image)
    extractor, own = load_extractor(config)
    digest = weights_hash(extractor, digits=16)
    reference = _open_reference(config, metrics, extractor, own, digest)
    return FeatureSpace(extractor, features, reference, per_image, digest)


def _open_reference(
    config: EvaluationConfig,
    metrics: Sequence[Metric],
    extractor: Inception | FeatureExtractor,
    own: Path | None,
    digest: str,
) -> Reference:
    """What the metrics compare with: `evaluation.reference`, or the extractor's own reference."""
    compared = {metric.name: metric.reference_needs for metric in metrics if metric.reference_needs}
    path = own if config.reference is None else Path(config.reference)
    if not compared:
        return Reference()
    if path is None:
        raise UserError(
            f"evaluation.reference must be given for {', '.join(compared)} with evaluation.features {INCEPTION}, "
            "got null; give a folder of images, an .npz, or statistics"
        )
    reference = open_reference(path, compared, extractor.num_features, digest)
    known = reference.features if reference.features is not None else reference.images
    if known is not None:
        what = f"the number of images in {path} (evaluation.reference)"
        for metric in metrics:
            if "features" in metric.reference_needs:
                metric.check_number(len(known), what, config, extractor.num_features)
    if reference.images is not None:
        _check_channels(extractor, reference.images, "evaluation.reference")
    return reference


def _check_channels(extractor: nn.Module, images: ImageSet, key: str) -> None:
    if isinstance(extractor, FeatureExtractor) and images.shape[0] != 1:
        raise UserError(
            f"{key}: expected grey images, as evaluation.features takes them, got {images.shape[0]} "
            f"channels in {images.path}; give grey ones or evaluation.features {INCEPTION}"
        )
