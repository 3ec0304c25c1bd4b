"""The pretrained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tcaq_lightning.config.checks import Section, require_text


@dataclass
class ModelConfig(Section):
    """Which pretrained model to quantize."""

    path: str = "fashion-mnist-ddpm"
    """A directory in diffusers layout (model_index.json), a hub id, or the name of a shipped model."""
    architecture: str | None = None
    """Configuration that --dry_run plans with if there is nothing at model.path: the name of a shipped configuration
    without weights, such as stable-diffusion-v1-4, or a directory with one."""
    variant: str | None = None
    """Variant of the weight files, such as fp16; null takes the files without a variant."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that the model computes in; quantizers and rounding are always computed in float32."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        for name in ("path", "architecture", "variant"):
            require_text(getattr(self, name), f"model.{name}")
