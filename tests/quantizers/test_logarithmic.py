from __future__ import annotations

import math

import pytest
import torch

from tcaq_lightning.quantizers.logarithmic import ADALOG_TAUS, log_codes, log_fake_quantize, log_values

TAUS = {"log2": 1.0, "log_sqrt2": 0.5, "adalog": ADALOG_TAUS[3]}


def reference(x: float, delta: float, tau: float, bits: int) -> tuple[int, float]:
    top = 2**bits - 1
    q = top if x == 0 else min(max(round(-math.log2(x / delta) / tau), 0), top)
    return q, 0.0 if q == top else delta * 2 ** (-tau * q)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("tau", TAUS.values(), ids=TAUS.keys())
def test_equals_a_loop_over_the_definition(bits: int, tau: float) -> None:
    x = torch.cat([torch.zeros(1), torch.rand(200, generator=torch.Generator().manual_seed(bits)) ** 4])
    delta = torch.tensor(0.7)
    codes = log_codes(x, delta, torch.tensor(tau), bits)
    got = log_fake_quantize(x, delta, torch.tensor(tau), bits)
    for value, code, quantized in zip(x.tolist(), codes.tolist(), got.tolist(), strict=True):
        q, expected = reference(value, delta.item(), tau, bits)
        assert code == q
        assert quantized == pytest.approx(expected, rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("tau", TAUS.values(), ids=TAUS.keys())
def test_every_code_is_reachable_and_the_last_is_zero(bits: int, tau: float) -> None:
    delta, exponent = torch.tensor(0.9), torch.tensor(tau)
    codes = torch.arange(2.0**bits)
    values = log_values(codes, delta, exponent, bits)
    assert values[-1] == 0
    assert bool((values[:-1] > 0).all())
    assert torch.equal(log_codes(values, delta, exponent, bits), codes)
    assert torch.equal(log_fake_quantize(values, delta, exponent, bits), values)


def test_log2_is_exact_on_powers_of_two() -> None:
    powers = torch.exp2(-torch.arange(15.0))
    assert torch.equal(log_fake_quantize(powers, torch.tensor(1.0), torch.tensor(1.0), bits=4), powers)


def test_a_table_of_parameters_is_broadcast() -> None:
    x = torch.rand(3, 2, 4)
    delta, tau = torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1), torch.tensor([1.0, 0.5, 1.5]).view(3, 1, 1)
    rows = [log_fake_quantize(x[i], delta[i], tau[i], 4) for i in range(3)]
    assert torch.equal(log_fake_quantize(x, delta, tau, 4), torch.stack(rows))


def test_gradient_passes_except_where_clipped_or_sent_to_zero() -> None:
    delta, tau, bits = torch.tensor(0.5), torch.tensor(1.0), 3
    x = torch.tensor([0.0, 1e-4, 0.5 * 2**-6.4, 0.1, 0.5, 0.69, 0.72, 1.0], requires_grad=True)
    upstream = torch.arange(1.0, 9)
    log_fake_quantize(x, delta, tau, bits).backward(upstream)
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 0, 0]
