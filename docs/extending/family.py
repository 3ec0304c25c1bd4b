"""A family of one's own: a denoiser of mixing stages, with what each of its layers is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from tcaq_lightning.config import Role
from tcaq_lightning.models.families import FAMILIES, Family, OutputLayer


class Stage(nn.Module):
    """A residual block whose second layer is added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widen = nn.Linear(width, 2 * width)
        self.to_time = nn.Linear(1, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, C), (B, 1) to (B, C)."""
        return x + self.narrow(torch.tanh(self.widen(x) + self.to_time(t)))


class StagedDenoiser(nn.Module):
    """Predicts the noise of (B, 4) samples."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.stages = nn.ModuleList(Stage(width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """(B, 4) samples at (B,) timesteps to (B, 4)."""
        x, t = self.stem(sample), timestep[:, None] / 1000
        for stage in self.stages:
            x = stage(x, t)
        return self.head(x)


@FAMILIES.register("StagedDenoiser")
class StagedFamily(Family):
    """Stages are reconstructed whole; a shift of `narrow`'s bias shifts what a stage returns."""

    blocks: ClassVar[Mapping[type[nn.Module], OutputLayer]] = {Stage: "narrow"}
    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {
        "input": ("stem",),
        "output": ("head",),
        "time": ("*.to_time",),
    }
