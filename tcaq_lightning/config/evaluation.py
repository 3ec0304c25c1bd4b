"""What is measured at the end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, get_args

from tcaq_lightning.config.checks import Section, require, require_count
from tcaq_lightning.config.sampler import SamplerConfig

Metric = Literal["fid", "sfid", "is", "kid", "precision_recall", "clip"]
"""What can be measured on images."""
INCEPTION = "inception"
"""Name of the feature extractor of published figures."""


@dataclass
class EvaluationConfig(Section):
    """What is measured at the end."""

    num_trajectories: int = 32
    """Held-out full-precision trajectories for the noise error."""
    num_images: int = 64
    """Images sampled from the same noise by both models, for MSE and PSNR."""
    fid_samples: int = 0
    """Images for FID and the other metrics; 0 leaves them out. Needs a model that evaluation.features fits."""
    features: str = "fashion-mnist-features"
    """Feature extractor: inception, the one of published figures; a directory, or the name of a shipped one."""
    batch_size: int = 64
    """Samples per forward pass."""
    sampler: SamplerConfig | None = None
    """Sampler of the images; null takes calibration.sampler."""
    metrics: list[Metric] = field(default_factory=lambda: ["fid"])
    """What is measured on the fid_samples images: fid, kid, precision_recall; with features: inception also sfid and
    is; with clip_model and clip_prompts also clip."""
    reference: str | None = None
    """Real images to compare with: a folder of images, an .npz with images (arr_0) or statistics (mu, sigma, mu_s,
    sigma_s), or a .safetensors of `python -m tcaq_lightning statistics`; null takes the extractor's own."""
    inception_weights: str | None = None
    """File with torch-fidelity's weights of Inception v3; null looks for it in torch hub's cache."""
    is_splits: int = 10
    """Parts of the images whose inception scores are averaged."""
    kid_subsets: int = 100
    """Random subsets that KID is averaged over."""
    kid_subset_size: int = 1000
    """Images in each of them."""
    neighbours: int = 3
    """Nearest neighbours k of precision and recall."""
    clip_model: str | None = None
    """Directory of a CLIP model in transformers' layout."""
    clip_prompts: str | None = None
    """Text file with the prompt of each image, one a line."""
    save_images: str | None = None
    """Directory for all images as PNG files (clipped to [0, 1], times 255, rounded); null writes none."""

    def check(self) -> None:
        """See that all values can be worked with."""
        if self.sampler is not None:
            self.sampler.check("evaluation.sampler")
        require_count(self.num_trajectories, "evaluation.num_trajectories")
        require_count(self.num_images, "evaluation.num_images")
        require(self.fid_samples >= 0, "evaluation.fid_samples", "at least 0", self.fid_samples)
        require_count(self.batch_size, "evaluation.batch_size")
        require(
            0 < len(self.metrics) == len(set(self.metrics)) and set(self.metrics) <= set(get_args(Metric)),
            "evaluation.metrics",
            f"different ones of {', '.join(get_args(Metric))}",
            self.metrics,
        )
        require_count(self.is_splits, "evaluation.is_splits")
        require_count(self.kid_subsets, "evaluation.kid_subsets")
        require(self.kid_subset_size >= 2, "evaluation.kid_subset_size", "at least 2", self.kid_subset_size)
        require_count(self.neighbours, "evaluation.neighbours")
        for metric in {"sfid", "is"} & set(self.metrics):
            require(self.features == INCEPTION, "evaluation.features", f"{INCEPTION} for {metric}", self.features)
        if "clip" in self.metrics:
            for name in ("clip_model", "clip_prompts"):
                require(bool(getattr(self, name)), f"evaluation.{name}", "given for clip", getattr(self, name))
        if self.fid_samples:
            self.check_number(self.fid_samples, "evaluation.fid_samples", self.metrics)

    def check_number(self, number: int, what: str, metrics: Collection[str]) -> None:
        """See that there are enough images for some metrics, real or generated ones.

        Args:
            number: of images.
            what: they are, for the message.
            metrics: that look at these images.

        Raises:
            UserError: there are too few.
        """
        least = {
            "is": (self.is_splits, "evaluation.is_splits"),
            "kid": (self.kid_subset_size, "evaluation.kid_subset_size"),
            "precision_recall": (self.neighbours + 1, "evaluation.neighbours + 1"),
        }
        for metric, (needed, key) in least.items():
            if metric in metrics:
                require(number >= needed, what, f"at least {needed} for {metric} ({key})", number)
