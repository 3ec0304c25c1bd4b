from __future__ import annotations

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tcaq_lightning.models.graph import trace_units


class Denoiser(nn.Module):
    """A unit, a part of which is called again behind it."""

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.block, self.last, self.other = Block(), nn.Linear(4, 4), other

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.block(x, t)
        return self.last(y + self.block.part(t + 1 if self.other else t))  # type: ignore[no-any-return]


class Block(ResnetBlock2D):
    """A unit by its class."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.part, self.skip_time_act = nn.Linear(4, 4), False

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.part(t)  # type: ignore[no-any-return]


@pytest.mark.parametrize("other", [False, True])
def test_parts_of_units_that_are_called_again_are_known_where_they_give_the_same(other: bool) -> None:
    model = Denoiser(other)
    x, t = torch.randn(3, 4), torch.randn(3, 4)
    graph = trace_units(model, lambda: model(x, t))
    assert graph.names == ["block", "last"]
    assert graph.echoes == ({} if other else {"block": {"block.part": (4,)}})
    assert graph.alive_after(0) == ({"block"} if other else {"block", "block.part"})
    assert graph.alive_after(1) == set()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
