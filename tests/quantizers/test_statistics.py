from __future__ import annotations

import pytest
import torch

from tcaq_lightning.quantizers.statistics import RangeStatistics


@pytest.mark.parametrize(
    ("shape", "channel_dim"), [((7, 3, 4, 4), 1), ((7, 5, 3), -1), ((7, 3), -1), ((7, 2, 5, 3), -1)]
)
def test_equals_a_loop_whatever_the_batches(shape: tuple[int, ...], channel_dim: int) -> None:
    x, groups = torch.randn(shape), torch.tensor([0, 2, 2, 0, 2, 0, 2])
    statistics = RangeStatistics(num_groups=3, channels=3)
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        statistics.update(x[part], groups[part], channel_dim)
    for g in (0, 2):
        for c in range(3):
            values = x[groups == g].select(channel_dim, c)
            assert statistics.low[g, c] == values.min()
            assert statistics.high[g, c] == values.max()
    assert bool(statistics.low[1].isposinf().all())
    assert torch.equal(statistics.magnitude()[1], torch.zeros(3))
    assert statistics.magnitude()[0, 0] == x[groups == 0].select(channel_dim, 0).abs().max()


def test_merging_is_exact() -> None:
    x, groups = torch.randn(8, 3, 4), torch.tensor([0, 1] * 4)
    whole, first, second = (RangeStatistics(2, 4) for _ in range(3))
    whole.update(x, groups, -1)
    first.update(x[:5], groups[:5], -1)
    second.update(x[5:], groups[5:], -1)
    first.merge(second)
    assert torch.equal(first.low, whole.low)
    assert torch.equal(first.high, whole.high)


def test_limits_are_those_of_the_scaled_values() -> None:
    x, groups, r = torch.randn(6, 5, 4), torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([0.5, 1, 2, 4])
    statistics = RangeStatistics(2, 4)
    statistics.update(x, groups, -1)
    low, high = statistics.limits(r)
    for g in range(2):
        scaled = x[groups == g] / r
        assert low[g] == scaled.min()
        assert high[g] == scaled.max()


def test_centre_and_shifted_ranges() -> None:
    x, groups = torch.randn(8, 3, 4) + torch.tensor([5.0, -2.0, 0.0, 1.0]), torch.tensor([0, 1] * 4)
    statistics = RangeStatistics(3, 4)  # one group is not seen
    statistics.update(x, groups, -1)
    parts = [x[groups == g].flatten(0, 1) for g in range(2)]
    middles = [(p.amin(0) + p.amax(0)) / 2 for p in parts]
    torch.testing.assert_close(statistics.centre(), (middles[0] + middles[1]) / 2)
    shift = torch.tensor([5.0, -2.0, 0.5, 1.0])
    of_shifted = RangeStatistics(3, 4)
    of_shifted.update(x - shift, groups, -1)
    torch.testing.assert_close(statistics.shifted(shift).low, of_shifted.low)
    torch.testing.assert_close(statistics.shifted(shift).magnitude(), of_shifted.magnitude())
