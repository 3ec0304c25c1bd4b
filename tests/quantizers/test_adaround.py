from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcaq_lightning.quantizers.adaround import (
    adaround_regularizer,
    annealed_beta,
    initial_logits,
    rectified_sigmoid,
    soft_round,
    undecided_share,
)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@given(st.floats(0, 1, exclude_max=True, width=32))
def test_initial_logits_reproduce_the_fraction(fraction: float) -> None:
    assert rectified_sigmoid(initial_logits(torch.tensor(fraction))).item() == pytest.approx(fraction, abs=1e-6)


@given(st.floats(-30, 30))
def test_h_equals_the_formula(v: float) -> None:
    expected = min(max(1.2 / (1 + math.exp(-v)) - 0.1, 0.0), 1.0)
    assert rectified_sigmoid(torch.tensor(v)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("beta", [2.0, 5.5, 20.0])
def test_regularizer_equals_a_loop_and_its_gradient_autograds(beta: float) -> None:
    v = torch.linspace(-4, 4, 16, dtype=torch.float64).requires_grad_()
    loop = sum(1 - abs(2 * min(max(1.2 / (1 + math.exp(-x)) - 0.1, 0), 1) - 1) ** beta for x in v.tolist())
    formula = (1 - (2 * torch.clamp(1.2 * torch.sigmoid(v) - 0.1, 0, 1) - 1).abs() ** beta).sum()
    (gradient,) = torch.autograd.grad(formula, v)
    before = torch.linspace(1, -2, 16, dtype=torch.float64)
    penalty, total = adaround_regularizer(v, before, scalar(beta), scalar(0.3))
    assert penalty.item() == pytest.approx(loop)
    torch.testing.assert_close(total, before + 0.3 * gradient)


def test_soft_rounding_equals_its_formula_and_its_gradients_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=generator).mul_(3).requires_grad_()
    base = torch.randint(-8, 8, v.shape, generator=generator).double()
    unit = torch.rand(4, 3, 1, 1, dtype=torch.float64, generator=generator).requires_grad_()
    chain = (base + torch.clamp(1.2 * torch.sigmoid(v) - 0.1, 0, 1)) * unit
    rounded = soft_round(v, base, unit)
    torch.testing.assert_close(rounded, chain)
    weights = torch.randn(v.shape, dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad((chain * weights).sum(), [v, unit])
    torch.testing.assert_close(torch.autograd.grad((rounded * weights).sum(), [v, unit]), expected)


def test_regularizer_is_zero_only_where_rounding_is_decided() -> None:
    for logits, expected in (([-9.0, 9.0], 0), ([0.0], 1)):
        penalty, total = adaround_regularizer(
            torch.tensor(logits), torch.zeros(len(logits)), torch.tensor(2.0), torch.tensor(1.0)
        )
        assert penalty == expected
        assert not total.any()


def test_beta_waits_and_then_falls_linearly() -> None:
    assert all(math.isinf(annealed_beta(p)) for p in (0.0, 0.1, 0.199))
    betas = [annealed_beta(p) for p in (0.2, 0.4, 0.6, 0.8, 1.0)]
    assert betas == pytest.approx([20, 15.5, 11, 6.5, 2])
    assert annealed_beta(0.0, warmup=0.0) == 20


def test_undecided_share_counts_by_distance_from_both_ends() -> None:
    h = torch.tensor([0.01, 0.04, 0.06, 0.5, 0.94, 0.96])
    assert undecided_share(initial_logits(h)) == pytest.approx(0.5)
