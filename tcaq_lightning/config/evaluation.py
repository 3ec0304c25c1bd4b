"""What is measured at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from tcaq_lightning.config.checks import Section, require, require_count, require_text
from tcaq_lightning.config.sampler import SamplerConfig

INCEPTION = "inception"
"""Name of the feature extractor of published figures."""


@dataclass
class EvaluationConfig(Section):
    """What is measured at the end."""

    num_trajectories: int = 32
    """Held-out full-precision trajectories for the noise error."""
    num_images: int = 64
    """Images sampled from the same noise by both models, for MSE and PSNR, clipped."""
    fid_samples: int = 0
    """Images for FID and the other metrics; 0 leaves them out. evaluation.features must suit the model's images."""
    features: str = "fashion-mnist-features"
    """Feature extractor: inception, the one of published figures; a directory, or the name of a shipped one."""
    batch_size: int = 64
    """Samples per forward pass."""
    sampler: SamplerConfig | None = None
    """Sampler of the images; null takes calibration.sampler."""
    metrics: list[str] = field(default_factory=lambda: ["fid"])
    """What is measured on the fid_samples images: fid, kid, precision_recall; with features: inception also sfid and
    is; with clip_model and clip_prompts also clip; and metrics that a module in `extensions` registers."""
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
        """Check that all values can be worked with."""
        if self.sampler is not None:
            self.sampler.check("evaluation.sampler")
        require_count(self.num_trajectories, "evaluation.num_trajectories", most=100_000)
        require_count(self.num_images, "evaluation.num_images", most=10**7)
        require_count(self.fid_samples, "evaluation.fid_samples", 0, 10**7)
        require_count(self.batch_size, "evaluation.batch_size", most=2**20)
        require(
            0 < len(self.metrics) == len(set(self.metrics)),
            "evaluation.metrics",
            "a list of different metrics",
            self.metrics,
        )
        require_count(self.is_splits, "evaluation.is_splits", most=10**6)
        require_count(self.kid_subsets, "evaluation.kid_subsets", most=10**6)
        require_count(self.kid_subset_size, "evaluation.kid_subset_size", 2, 10**7)
        require_count(self.neighbours, "evaluation.neighbours", most=10**6)
        for name in ("features", "reference", "inception_weights", "clip_model", "clip_prompts", "save_images"):
            require_text(getattr(self, name), f"evaluation.{name}")
