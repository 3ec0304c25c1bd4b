"""The feature extractor behind FID for small grey images: a classifier's penultimate layer.

Inception v3, the usual extractor, was trained on colour photographs of 299 x 299 and says little about 28 x 28
garments; a classifier of the data set itself takes its place, as is common for MNIST-like data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.json_files import read_json

SHIPPED = Path(__file__).parents[1] / "models" / "assets" / "fashion-mnist-features"
CONFIG_FILE = "config.json"
DAMAGE = (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError, ZeroDivisionError)
"""What a config that is none raises, on its way to a network."""
WEIGHTS_FILE = "model.safetensors"
REFERENCE_FILE = "reference.safetensors"


class FeatureExtractor(nn.Module):
    """Small convolutional network from images to feature vectors.

    Five 3x3 convolutions with group norm, two of them with stride 2, an average over 3 x 3 regions and a linear layer.
    The features are taken before any activation, so that a Gaussian describes them better. Nothing depends on
    training or evaluation mode.

    Args:
        channels: of the first convolution, of the two at half and of the two at quarter resolution.
        num_features: length of the feature vector.
        num_groups: of the group norms.
    """

    def __init__(
        self, channels: tuple[int, int, int] = (16, 32, 64), num_features: int = 64, num_groups: int = 8
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_features = num_features
        self.num_groups = num_groups
        widths = [(1, channels[0], 1), (channels[0], channels[1], 2), (channels[1], channels[1], 1)]
        widths += [(channels[1], channels[2], 2), (channels[2], channels[2], 1)]
        layers: list[nn.Module] = []
        for inputs, outputs, stride in widths:
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                nn.GroupNorm(num_groups, outputs),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.projection = nn.Linear(channels[2] * 9, num_features)

    def forward(self, images: Tensor) -> Tensor:
        """Feature vectors of a batch.

        Args:
            images: float (B, 1, H, W) in [-1, 1]; values outside are clamped.

        Returns:
            (B, num_features).

        >>> FeatureExtractor()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 64])
        """
        x = self.body(images.clamp(-1, 1))
        features: Tensor = self.projection(F.adaptive_avg_pool2d(x, 3).flatten(1))  # (B, 9 C)
        return features

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this network again."""
        return {"channels": list(self.channels), "num_features": self.num_features, "num_groups": self.num_groups}


def extract_features(extractor: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features of many images, batch by batch.

    Args:
        extractor: maps (B, 1, H, W) to (B, num_features).
        images: (N, 1, H, W) in [-1, 1].
        batch_size: B.

    Returns:
        (N, num_features), on the device of the images.
    """
    with torch.no_grad():
        return torch.cat([extractor(batch) for batch in torch.split(images, batch_size)])


def save_feature_extractor(extractor: FeatureExtractor, directory: Path, facts: dict[str, Any]) -> None:
    """Write the extractor as config.json and safetensors.

    Args:
        extractor: to be written.
        directory: made if it is not there.
        facts: further entries of config.json, such as the accuracy of the classifier.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in extractor.state_dict().items()}
    save_file(weights, directory / WEIGHTS_FILE)
    text = json.dumps({"architecture": extractor.config, **facts}, indent=2) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")


def load_feature_extractor(directory: Path | None = None) -> FeatureExtractor:
    """Read an extractor, by default the shipped one for Fashion-MNIST.

    Args:
        directory: as written by `python -m tcaq_lightning.zoo.pretraining.classifier`.

    Returns:
        The frozen extractor, on the CPU.

    Raises:
        UserError: a file is missing, or the weights do not fit the configuration.

    >>> load_feature_extractor().num_features
    64
    """
    directory = SHIPPED if directory is None else directory
    try:
        architecture = read_json(directory / CONFIG_FILE)["architecture"]
        extractor = FeatureExtractor(
            tuple(architecture["channels"]), architecture["num_features"], architecture["num_groups"]
        )
        extractor.load_state_dict(load_file(directory / WEIGHTS_FILE))
    except (OSError, MemoryError, *DAMAGE, SafetensorError) as error:
        raise UserError(
            f"expected a feature extractor ({CONFIG_FILE}, {WEIGHTS_FILE}) in {directory}, "
            f"got {' '.join(str(error).split())[:200]}; "
            "write one with python -m tcaq_lightning.zoo.pretraining.classifier"
        ) from None
    return extractor.eval().requires_grad_(False)
