from __future__ import annotations

import pytest
import torch

from tcaq_lightning.methods.ranges import scaled_by_group, set_range
from tcaq_lightning.quantizers import ActivationQuantizer
from tcaq_lightning.quantizers.activation import along
from tcaq_lightning.quantizers.range_search import search_affine
from tcaq_lightning.quantizers.statistics import RangeStatistics
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups, values_by_group


@pytest.mark.parametrize(("shape", "channel_dim"), [((6, 4, 3, 5), 1), ((6, 7, 4), -1), ((6, 4), -1), ((1, 9, 4), -1)])
@pytest.mark.parametrize("values", [8, 10_000])
def test_few_values_are_scaled_as_all_of_them_would_be(shape: tuple[int, ...], channel_dim: int, values: int) -> None:
    quantizer = ActivationQuantizer(4, TimestepGroups([400.0, 800.0]), 4, channel_dim)
    quantizer.r.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]))
    x = torch.randn(shape)
    expected = x / along(quantizer.r, x.ndim, channel_dim)
    found = scaled_by_group(quantizer, x, 3, values)
    assert torch.equal(found, values_by_group(expected, 3, values))
    quantizer.allow_shift()
    assert quantizer.shift is not None
    quantizer.shift.copy_(torch.tensor([0.0, 1.0, -2.0, 0.5]))
    expected = quantizer.centred(x) / along(quantizer.r, x.ndim, channel_dim)
    found = scaled_by_group(quantizer, x, 3, values)
    assert torch.equal(found, values_by_group(expected, 3, values))


def test_each_group_gets_the_step_that_loses_least_of_its_own_values() -> None:
    x = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    x[3:] *= 10
    ranges = RangeStatistics(2, 4)
    ranges.update(x, torch.arange(2).repeat_interleave(3), 1)
    quantizer = ActivationQuantizer(4, TimestepGroups([500.0]), 4, 1)
    quantizer.headroom = 1.25
    set_range(quantizer, x, ranges)
    limits = ranges.low.amin(1), ranges.high.amax(1)
    delta, zero = search_affine(x.reshape(2, -1), 4, 16, limits)
    assert torch.equal(quantizer.delta, delta * 1.25)
    assert torch.equal(quantizer.zero_point, zero)
    assert quantizer.delta[1] > 5 * quantizer.delta[0]
