r"""FID of a pretrained model under several samplers, to decide between two sets of weights.

    python -m tcaq_lightning.zoo.pretraining.score --model fashion-mnist-ddpm --num_images 5000 --steps [20,100] \
        --clip_sample [true,false] [--grid grid.png] [--threads 2]
    python -m tcaq_lightning.zoo.pretraining.score --model fashion-mnist-latent --num_images 2000 --guidance_scale [1,2]

A class-conditional model samples its classes in equal shares, and the share of samples that are recognised as what was
asked for is stated too. One line of JSON for each sampler is written to standard output.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tcaq_lightning.config import ConditioningConfig, SamplerConfig
from tcaq_lightning.evaluation.features import REFERENCE_FILE, SHIPPED, extract_features, load_feature_extractor
from tcaq_lightning.evaluation.metrics.fid import frechet_distance
from tcaq_lightning.evaluation.recognition import CLASSES_FILE, ClassStatistics
from tcaq_lightning.evaluation.reference_statistics import ReferenceStatistics
from tcaq_lightning.models.pipelines import find_denoiser, open_pipeline, to_images
from tcaq_lightning.models.sampling import make_sampling, num_classes
from tcaq_lightning.zoo.pretraining.command import run


def tile(images: Tensor, columns: int = 8) -> Image.Image:
    """Images side by side, row by row; the last row may be cut off.

    Args:
        images: (N, 1, H, W) in [0, 1], N >= columns.
        columns: images a row.

    >>> tile(torch.zeros(6, 1, 28, 28), columns=3).size
    (84, 56)
    """
    rows = len(images) // columns
    height, width = images.shape[-2:]
    grid = images[: rows * columns, 0].reshape(rows, columns, height, width).transpose(1, 2)  # (R, H, C, W)
    pixels = grid.reshape(rows * height, columns * width).mul(255).round().byte()
    return Image.fromarray(pixels.numpy())


def main(
    model: str,
    num_images: int = 5000,
    steps: list[int] | None = None,
    clip_sample: list[bool] | None = None,
    guidance_scale: list[float] | None = None,
    features: Path = SHIPPED,
    batch_size: int = 100,
    seed: int = 0,
    threads: int | None = None,
    grid: Path | None = None,
) -> None:
    """Sample with DDIM and compare with the test images.

    Args:
        model: directory in diffusers layout, or name of a shipped model.
        num_images: images for each sampler.
        steps: numbers of sampler steps; without it, 20.
        clip_sample: whether DDIM clips its prediction of x_0; without it, both; false for classes.
        guidance_scale: scales of classifier-free guidance; without it, 1. For class-conditional models only.
        features: directory of the feature extractor and its reference statistics.
        batch_size: images at a time.
        seed: of the noise.
        threads: CPU threads; without it, PyTorch's own number.
        grid: PNG file for the first 64 images of the first sampler, or 100, a class a column.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    scored = _Scored(open_pipeline(model), features, num_images, batch_size, seed)
    clips = clip_sample or ([True, False] if scored.classes is None else [False])
    scales: list[Any] = guidance_scale or [None if scored.classes is None else 1.0]
    for num_steps, clip, scale in itertools.product(steps or [20], clips, scales):
        vectors, first = scored.sample(SamplerConfig("DDIMScheduler", num_steps, options={"clip_sample": clip}), scale)
        if grid is not None:
            tile(to_images(first), scored.columns).save(grid)
            grid = None
        line: dict[str, Any] = {"model": model, "steps": num_steps, "clip_sample": clip, "images": num_images}
        line |= {"seed": seed, **scored.distance(vectors)}
        if scored.classes is not None:
            line |= {"guidance_scale": scale, "recognised": scored.recognised(vectors)}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


class _Scored:
    """A model with what its images are compared with.

    Args:
        pipeline: of the model.
        features: directory of the feature extractor and its reference statistics.
        num_images: images for each sampler.
        batch_size: images at a time.
        seed: of the noise.

    Attributes:
        classes: number of classes; None for an unconditional model.
        columns: of the grid.
    """

    def __init__(self, pipeline: Any, features: Path, num_images: int, batch_size: int, seed: int) -> None:
        self.pipeline, self.num_images, self.batch_size, self.seed = pipeline, num_images, batch_size, seed
        _, self.denoiser = find_denoiser(pipeline)
        self.extractor = load_feature_extractor(features)
        self.reference = ReferenceStatistics.load(features / REFERENCE_FILE)
        self.classes = classes = num_classes(pipeline, self.denoiser)
        self.statistics = None if classes is None else ClassStatistics.load(features / CLASSES_FILE)
        self.columns, self.shown = (8, 64) if classes is None else (classes, 10 * classes)

    def sample(self, sampler: SamplerConfig, scale: float | None) -> tuple[Tensor, Tensor]:
        """Features of all images, (N, F), and the images of the grid."""
        labels = None if self.classes is None else list(range(self.classes))
        sampling = make_sampling(self.pipeline, ConditioningConfig(guidance_scale=scale, class_labels=labels))
        vectors: list[Tensor] = []
        first: list[Tensor] = []
        for start in range(0, self.num_images, self.batch_size):
            indices = range(start, min(start + self.batch_size, self.num_images))
            images = sampling.sample(self.denoiser, sampler, indices, self.seed)
            vectors.append(extract_features(self.extractor, images))
            if len(first) * self.batch_size < self.shown:
                first.append(images)
        return torch.cat(vectors), torch.cat(first)[: self.shown]

    def distance(self, vectors: Tensor) -> dict[str, float]:
        """FID and its interval, rounded."""
        result = frechet_distance(vectors, self.reference)
        values = {"fid": result.value, "low": result.low, "high": result.high}
        return {name: round(value, 4) for name, value in values.items()}

    def recognised(self, vectors: Tensor) -> float:
        """Share of the images that are recognised as of the class that was asked for, rounded."""
        assert self.statistics is not None
        assert self.classes is not None
        asked = torch.arange(self.num_images) % self.classes
        return round(float((self.statistics.predict(vectors) == asked).double().mean()), 4)


if __name__ == "__main__":
    run(main)
