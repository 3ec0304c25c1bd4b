from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tcaq_lightning.methods import tcr
from tcaq_lightning.quantizers.weight import scale_of_inputs


@given(st.sampled_from(["linear", "conv", "grouped", "depthwise"]), st.integers(0, 10**6))
def test_reparameterization_leaves_a_layers_output(kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    r = torch.exp2(torch.rand(4, generator=generator, dtype=torch.float64) * 6 - 3)
    conv_groups = {"grouped": 2, "depthwise": 4}.get(kind, 1)
    if kind == "linear":
        x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        weight = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        before, after = F.linear(x, weight), F.linear(x / r, weight * scale_of_inputs(r, weight))
    else:
        x = torch.randn(2, 4, 5, 5, generator=generator, dtype=torch.float64)
        weight = torch.randn(8, 4 // conv_groups, 3, 3, generator=generator, dtype=torch.float64)
        scaled = weight * scale_of_inputs(r, weight, conv_groups)
        before = F.conv2d(x, weight, padding=1, groups=conv_groups)
        after = F.conv2d(x / r.view(1, -1, 1, 1), scaled, padding=1, groups=conv_groups)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


def magnitudes(steps: int = 6, channels: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(steps, channels, generator=generator) * torch.logspace(-1, 1, channels) + 0.01


def test_profile_equals_the_formulas_by_loops() -> None:
    m = magnitudes()
    target = m.mean(1)
    for d in range(m.shape[1]):
        numerator = sum((m[t, d] / target[t]) * m[t, d] for t in range(m.shape[0]))
        denominator = sum(m[t, d] for t in range(m.shape[0]))
        assert tcr.channel_profile(m, target)[d] == pytest.approx(float(numerator / denominator), rel=1e-5)


def test_published_r_equals_the_formulas_by_loops() -> None:
    m = magnitudes()
    for truncation in (10.0, 3.0):
        r = tcr.published_r(m, truncation)
        for d in range(m.shape[1]):
            relative = [float(m[t, d] / min(m[t])) for t in range(m.shape[0])]
            expected = sum(q * float(m[t, d]) for t, q in enumerate(relative)) / float(m[:, d].sum())
            assert r[d] == pytest.approx(min(max(expected, 1), truncation), rel=1e-5)


def test_dead_channels_and_groups_do_no_harm() -> None:
    m = magnitudes()
    m[:, 2] = 0
    m[3] = 0
    for r in (tcr.published_r(m), *tcr.candidates(m, torch.rand(9)), *tcr.candidates(m * 0, torch.zeros(9))):
        assert bool(r.isfinite().all())
        assert bool((r > 0).all())
    assert tcr.published_r(m)[2] == 1


def test_candidates_begin_with_nothing_and_are_distinct() -> None:
    grid = tcr.candidates(magnitudes(), torch.rand(9) + 0.1)
    assert torch.equal(grid[0], torch.ones(9))
    assert len(grid) > 5
    for i in range(len(grid)):
        for j in range(i):
            assert (grid[i] / grid[j]).log().abs().max() > 0.02


def test_candidates_have_geometric_mean_one_before_clipping() -> None:
    m, w = magnitudes(), torch.rand(9) + 0.1
    free, clipped = tcr.candidates(m, w, truncation=1e9), tcr.candidates(m, w, truncation=3.0)
    torch.testing.assert_close(free.log().mean(1), torch.zeros(len(free)), rtol=0, atol=1e-5)
    assert clipped.max() <= 3
    assert clipped.min() >= 1 / 3 - 1e-6
    smooth = m.mean(0)[None].expand_as(m)  # one range for all timesteps: p is that range over its target
    expected = (smooth[0] ** 0.5 / w**0.5).log()
    found = tcr.candidates(smooth, w, truncation=1e9).log()
    assert (found - (expected - expected.mean())).abs().amax(1).min() < 1e-3  # SmoothQuant's r is among them
