"""Observers: exact, however the stream is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcaq_lightning.errors import UserError
from tcaq_lightning.quantizers.observers import LogHistogram, RangeStatistics


@pytest.mark.parametrize(
    ("shape", "channel_dim"), [((7, 3, 4, 4), 1), ((7, 5, 3), -1), ((7, 3), -1), ((7, 2, 5, 3), -1)]
)
def test_ranges_equal_a_loop_whatever_the_batches(shape: tuple[int, ...], channel_dim: int) -> None:
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


def test_merging_ranges_is_exact() -> None:
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


def attention(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(samples, 2, 5, 40, generator=generator) * 4
    return scores.softmax(-1), torch.randint(0, 3, (samples,), generator=generator)


def counted(values: Tensor, groups: Tensor, **arguments: float) -> LogHistogram:
    histogram = LogHistogram(3, **arguments)  # type: ignore[arg-type]
    histogram.update(values, groups)
    return histogram


@pytest.mark.parametrize(("low", "bins_per_decade"), [(1e-8, 40), (1e-8, 200), (3e-5, 7), (0.1, 1), (1e-30, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_counts_agree_with_a_loop_over_searchsorted(low: float, bins_per_decade: int, dtype: torch.dtype) -> None:
    values, groups = attention(6)
    values = values.to(dtype)
    histogram = LogHistogram(3, low, bins_per_decade)
    inner = histogram.edges[1:-1].float()
    values.view(6, -1)[0, : inner[:50].numel()] = inner[:50].to(dtype)  # on the edges themselves
    values.view(6, -1)[1, :3] = torch.tensor([0.0, -0.0, 1.0])
    histogram.update(values, groups)
    expected = np.zeros(histogram.counts.shape, dtype=np.int64)
    for sample, group in zip(values.float().numpy(), groups.tolist(), strict=True):
        np.add.at(expected[group], np.searchsorted(inner.numpy(), sample.ravel(), side="right"), 1)
    assert np.array_equal(histogram.counts.numpy(), expected)
    assert histogram.counts.dtype == torch.int64


def test_edges_are_logarithmic_from_low_to_one() -> None:
    edges = LogHistogram(1, low=1e-8, bins_per_decade=40).edges
    assert edges.shape == (322,)
    assert edges[0] == 0
    assert edges[-1] == 1
    np.testing.assert_allclose(edges[1:].numpy(), 10 ** np.linspace(-8, 0, 321), rtol=1e-12)


def test_zeros_and_tiny_values_are_underflow_and_one_is_in_the_last_bin() -> None:
    values = torch.tensor([[0.0, -0.0, 1e-40, 9.9e-9, 1.0, 1.0000001]])
    counts = counted(values, torch.tensor([1])).counts
    assert counts[1, 0] == 4
    assert counts[1, -1] == 2
    assert counts.sum() == 6


@pytest.mark.parametrize("pieces", [1, 3, 8])
def test_streaming_in_pieces_is_exactly_all_at_once(pieces: int) -> None:
    values, groups = attention(24)
    whole = counted(values, groups)
    streamed = LogHistogram(3)
    for part, part_groups in zip(values.chunk(pieces), groups.chunk(pieces), strict=True):
        streamed.update(part, part_groups)
    transposed = counted(values.transpose(1, 3), groups)  # not contiguous
    assert torch.equal(whole.counts, streamed.counts)
    assert torch.equal(whole.counts, transposed.counts)
    assert whole.counts.sum() == values.numel()


def test_more_values_than_one_internal_chunk() -> None:
    values, _ = attention(1)
    big = values.reshape(1, -1).repeat(5, 800)  # 5 x 320,000
    counts = counted(big, torch.tensor([0, 0, 1, 2, 0])).counts
    once = counted(values, torch.tensor([0])).counts[0]
    assert torch.equal(counts, torch.stack([2400 * once, 800 * once, 800 * once]))


@given(seed=st.integers(0, 1000), permutation_seed=st.integers(0, 1000), cut=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_permutation_invariant_and_merge_commutative(seed: int, permutation_seed: int, cut: int) -> None:
    values, groups = attention(9, seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(permutation_seed))
    whole = counted(values, groups)
    assert torch.equal(whole.counts, counted(values[order].flip(-1), groups[order]).counts)
    first, second = counted(values[:cut], groups[:cut]), counted(values[cut:], groups[cut:])
    reverse = counted(values[cut:], groups[cut:])
    reverse.merge(first)
    first.merge(second)
    assert torch.equal(first.counts, whole.counts)
    assert torch.equal(reverse.counts, whole.counts)


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [
        ([[0.5, float("nan")]], [0], "finite"),
        ([[0.5, float("inf")]], [0], "finite"),
        ([[0.5, -0.1]], [0], r"\[0, 1\]"),
        ([[0.5, 1.5]], [0], r"\[0, 1\]"),
        ([[0.5]], [3], r"0\.\.2"),
        ([[0.5]], [-1], r"0\.\.2"),
        ([[0.5]], [0, 1], "one index per sample"),
    ],
)
def test_wrong_input_is_refused(values: list[list[float]], groups: list[int], message: str) -> None:
    histogram = LogHistogram(3)
    with pytest.raises(UserError, match=message):
        histogram.update(torch.tensor(values), torch.tensor(groups))
    assert histogram.counts.sum() == 0


@pytest.mark.parametrize("arguments", [{"num_groups": 0}, {"low": 0.0}, {"low": 0.5}, {"bins_per_decade": 500}])
def test_wrong_settings_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(UserError):
        LogHistogram(**{"num_groups": 1} | arguments)  # type: ignore[arg-type]


def test_histograms_with_different_edges_do_not_merge() -> None:
    with pytest.raises(UserError, match="same groups and edges"):
        LogHistogram(2, low=1e-8).merge(LogHistogram(2, low=1e-6))
