from __future__ import annotations

from typing import Any

import pytest
import torch

from tcaq_lightning.config import HeadroomConfig
from tcaq_lightning.methods.headroom import leave_headroom
from tcaq_lightning.models.graph import trace_units
from tcaq_lightning.nn.parts import quant_layers


@pytest.mark.parametrize(("bits", "of_sample"), [(4, 2.0), (6, 1.5), (8, 1.5)])
def test_inputs_without_a_norm_before_them_are_widened(make_twins: Any, bits: int, of_sample: float) -> None:
    twins = make_twins()
    x, t = twins.x[:2], twins.timesteps[:2]
    graph = trace_units(twins.full, lambda: twins.full(x, t), x)
    leave_headroom(twins.quantized, graph, HeadroomConfig(), bits)
    headroom = {name: layer.input_quantizer.headroom for name, layer in quant_layers(twins.quantized).items()}
    assert {n for n, factor in headroom.items() if factor != 1} == graph.direct & headroom.keys()
    assert headroom["conv_in"] == of_sample
    assert headroom["up_blocks.0.resnets.0.conv_shortcut"] == 1.35  # the residual stream
    assert headroom["mid_block.resnets.0.conv1"] == 1  # behind a norm
    leave_headroom(twins.quantized, graph, HeadroomConfig(enabled=False), bits)
    assert {layer.input_quantizer.headroom for layer in quant_layers(twins.quantized).values()} == {1.0}


def test_the_factor_widens_the_searched_range(make_twins: Any, initialized: Any) -> None:
    plain, wide = make_twins(samples=16), make_twins(samples=16)
    wide.unit("conv_in").input_quantizer.headroom = 1.5
    steps = [initialized(twins, "conv_in")[0].input_quantizer.delta for twins in (plain, wide)]
    assert torch.equal(steps[0] * 1.5, steps[1])
