from __future__ import annotations

from typing import Any

import pytest
import torch

from tcaq_lightning.calibration.losses import block_error
from tcaq_lightning.calibration.unit_errors import unit_errors, weighted_sum

CPU = torch.device("cpu")
ATTENTION, RESNET = "mid_block.attentions.0", "mid_block.resnets.0"


@pytest.mark.parametrize("name", [RESNET, ATTENTION, "time_embedding"])
def test_squared_errors_sum_to_the_mean_block_error_with_any_weights(prepare: Any, name: str) -> None:
    twins, unit, data = prepare(name)
    samples = torch.tensor([0, 3, 4, 9, 15])
    with torch.no_grad():
        output, target = data.run(unit, twins.timestep_groups, samples, CPU), data.targets[samples]
    got = unit_errors(unit, data, samples, twins.timestep_groups, 2, CPU).squares  # (G, C)
    torch.testing.assert_close(got.sum(), block_error(output, target), rtol=1e-4, atol=0)
    weights = torch.rand(got.shape)
    expected = block_error(output, target, weights[data.groups[samples]])
    torch.testing.assert_close((got * weights).sum(), expected, rtol=1e-4, atol=0)
    assert weighted_sum(got, weights) == float((got * weights).sum())
    assert weighted_sum(got, None) == float(got.sum())


@pytest.mark.parametrize(("name", "channel_dim"), [(RESNET, 1), (ATTENTION, 1), ("time_embedding", -1)])
def test_mean_errors_equal_a_loop(prepare: Any, name: str, channel_dim: int) -> None:
    twins, unit, data = prepare(name)
    samples = torch.tensor([0, 1, 5, 9, 12, 15])
    got = unit_errors(unit, data, samples, twins.timestep_groups, 4, CPU).means
    with torch.no_grad():
        difference = data.targets[samples] - data.run(unit, twins.timestep_groups, samples, CPU)
    for g in range(2):
        mine = difference[data.groups[samples] == g].movedim(channel_dim, 0)
        for c in range(len(mine)):
            assert got[g, c].item() == pytest.approx(mine[c].mean().item(), abs=1e-5)
    only_first = unit_errors(unit, data, samples[:2], twins.timestep_groups, 4, CPU).means
    assert not only_first[1].any()
