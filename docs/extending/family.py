"""A family of one's own: a denoiser of mixing stages, which diffusers lacks, and what each of its layers is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from tcaq_lightning.config import Role
from tcaq_lightning.models.families import FAMILIES, Family, OutputLayer
from tcaq_lightning.models.unets import DENOISERS


class Stage(nn.Module):
    """A residual block whose second layer is added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.to_time = nn.Linear(1, 2 * width)
        self.narrow = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, C, H, W), (B, 1) to (B, C, H, W)."""
        return x + self.narrow(torch.tanh(self.widen(x) + self.to_time(t)[..., None, None]))


@DENOISERS.register("StagedDenoiser")
class StagedDenoiser(ModelMixin, ConfigMixin):
    """Predicts the noise of images; called as the UNets of diffusers are."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 1, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.stages = nn.ModuleList(Stage(width) for _ in range(depth))
        self.head = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor | int, return_dict: bool = True) -> Any:
        """(B, C, H, W) samples at one timestep, or at (B,), to (B, C, H, W)."""
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        x, t = self.stem(sample), t[:, None].to(sample.dtype) / 1000
        for stage in self.stages:
            x = stage(x, t)
        return UNet2DOutput(self.head(x)) if return_dict else (self.head(x),)


@FAMILIES.register("StagedDenoiser")
class StagedFamily(Family):
    """Stages are reconstructed whole; a shift of `narrow`'s bias shifts what a stage returns."""

    blocks: ClassVar[Mapping[type[nn.Module], OutputLayer]] = {Stage: "narrow"}
    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {
        "input": ("stem",),
        "output": ("head",),
        "time": ("*.to_time",),
    }
