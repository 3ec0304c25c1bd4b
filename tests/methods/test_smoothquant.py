from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcaq_lightning.config import TCRConfig
from tcaq_lightning.methods.smoothquant import SmoothQuant, smoothing_factors
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.quantizers.observers import RangeStatistics

POSITIVE = st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4)


@given(POSITIVE, POSITIVE, st.sampled_from([0.25, 0.5, 0.75]))
def test_factors_equal_the_formula_by_a_loop(activations: list[float], weights: list[float], alpha: float) -> None:
    found = smoothing_factors(torch.tensor(activations), torch.tensor(weights), alpha)
    for r, x, w in zip(found.tolist(), activations, weights, strict=True):
        assert r == pytest.approx(x**alpha / w ** (1 - alpha), rel=1e-4)


def test_at_one_half_both_operands_have_equal_ranges() -> None:
    x, w = torch.rand(9) * 10 + 0.1, torch.rand(9) + 0.1
    r = smoothing_factors(x, w)
    torch.testing.assert_close(x / r, w * r)


def test_dead_channels_do_no_harm() -> None:
    r = smoothing_factors(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]))
    assert bool(r.isfinite().all())
    assert bool((r > 0).all())


def test_the_candidate_is_of_the_largest_values_over_all_timesteps() -> None:
    ranges = RangeStatistics(2, 3)
    ranges.low, ranges.high = (
        torch.tensor([[-4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 1, 0.5], [2, 1, 0.5]]),
    )
    (r,) = SmoothQuant(TCRConfig(truncation=1e6)).candidates(ranges, torch.ones(3))
    torch.testing.assert_close(r / r[1], torch.tensor([2.0, 1.0, 0.5**0.5]))
    assert float(r.log().mean()) == pytest.approx(0, abs=1e-6)


def test_it_is_chosen_by_name(make_twins: Any, initialized: Any) -> None:
    twins = make_twins(samples=16)
    unit, _, choices = initialized(twins, "mid_block.resnets.0", TCRConfig(formula="smoothquant"))
    assert choices.reparameterization
    for layer in quant_layers(unit).values():
        r = layer.input_quantizer.r
        assert float(r.log().mean()) == pytest.approx(0, abs=0.2)  # geometric mean 1 but for the truncation
        assert r.max() > r.min()
