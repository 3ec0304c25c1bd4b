from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tcaq_lightning.models.forwards import dtype_at_hand


def test_dtype_is_at_hand_for_a_while(make_unet: Any) -> None:
    unet, looks = make_unet(), []

    class Counting(type(unet)):  # type: ignore[misc]
        @property
        def dtype(self) -> torch.dtype:
            looks.append(1)
            return torch.float32

    unet.__class__ = Counting
    x = torch.randn(2, 1, 8, 8)
    expected = unet(x, 5).sample
    assert looks
    looks.clear()
    with dtype_at_hand(unet):
        assert isinstance(unet, Counting)
        assert torch.equal(unet(x, 5).sample, expected)
        assert unet.dtype == torch.float32
    assert len(looks) == 1
    assert type(unet) is Counting
    with dtype_at_hand(module := nn.Linear(2, 2)):  # has none
        assert type(module) is nn.Linear
