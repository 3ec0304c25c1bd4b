from __future__ import annotations

from typing import Any

import pytest
import torch

from tcaq_lightning.calibration.bias_correction import ShiftedLayer, correct_bias, follow_mean_error, shifted_layer
from tcaq_lightning.calibration.unit_errors import unit_errors
from tcaq_lightning.config import ReconstructionConfig
from tcaq_lightning.nn.parts import quant_layers

RESNET = "mid_block.resnets.0"


@pytest.mark.parametrize("count", [1, 8, 64])
def test_bias_correction_settles_however_many_samples_a_group_has(prepare: Any, count: int) -> None:
    _, unit, _ = prepare(RESNET)
    layer = quant_layers(unit)["conv2"]
    assert layer.bias_shift is not None
    shifted, share = ShiftedLayer(layer, 2.0), ReconstructionConfig().bias_rate
    groups = torch.ones(count, dtype=torch.long)
    for _ in range(80):
        residual = 0.5 - layer.bias_shift[groups][:, :, None, None] / 2.0
        follow_mean_error(shifted, residual.expand(-1, -1, 4, 4), groups, share)
    torch.testing.assert_close(layer.bias_shift[1], torch.ones(16), rtol=1e-2, atol=1e-2)
    assert not layer.bias_shift[0].any()


def test_a_corrected_unit_has_no_mean_error_left(prepare: Any) -> None:
    twins, unit, data = prepare(RESNET)
    shifted = shifted_layer(unit, RESNET, twins.quantized)
    assert shifted is not None
    assert shifted.layer is quant_layers(unit)["conv2"]
    samples, cpu = torch.arange(len(data)), torch.device("cpu")
    before = unit_errors(unit, data, samples, twins.timestep_groups, 8, cpu).means
    correct_bias(shifted, before)
    after = unit_errors(unit, data, samples, twins.timestep_groups, 8, cpu).means
    assert after.abs().max() < 1e-2 * before.abs().max()
