from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from tcaq_lightning.nn.output_layers import output_layer


@pytest.mark.parametrize("name", ["conv_in", "time_embedding", "mid_block.resnets.0", "mid_block.attentions.0"])
def test_a_shift_of_the_output_layers_bias_shifts_the_unit(make_unet: Any, name: str) -> None:
    unet = make_unet()
    unit = unet.get_submodule(name)
    found = output_layer(unit, name)
    assert found is not None
    layer, factor = unet.get_submodule(found[0]), found[1]
    if isinstance(unit, ResnetBlock2D):
        arguments: tuple[Tensor, ...] = (torch.randn(2, 16, 4, 4), torch.randn(2, 32))
    elif isinstance(unit, Attention):
        arguments = (torch.randn(2, 16, 4, 4),)
    else:
        arguments = (torch.randn(2, 1, 8, 8),) if name == "conv_in" else (torch.randn(2, 8),)
    before = unit(*arguments)
    layer.bias += 0.25 * factor
    torch.testing.assert_close(unit(*arguments), before + 0.25, rtol=1e-5, atol=1e-5)
