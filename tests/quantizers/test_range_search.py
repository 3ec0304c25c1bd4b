from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tcaq_lightning.quantizers.logarithmic import ADALOG_TAUS
from tcaq_lightning.quantizers.range_search import search_affine, search_common_zero, search_log, search_symmetric
from tcaq_lightning.quantizers.uniform import affine_range

P = 2.4


def rows(count: int = 5, size: int = 200, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=generator) * torch.logspace(-1, 1, count)[:, None]
    x[:, :2] *= 6  # outliers, so that clipping pays
    return x


def objective(row: np.ndarray, step: float, low: float, high: float) -> float:
    quantized = step * np.clip(np.rint(row / step), low, high)
    return float((np.abs(row - quantized) ** P).sum())


def as_rows(x: Tensor) -> list[np.ndarray]:
    return [row.double().numpy() for row in x]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_is_the_brute_force_optimum(bits: int) -> None:
    x, top = rows(), 2 ** (bits - 1)
    found = search_symmetric(x, bits, candidates=40)
    for row, step in zip(as_rows(x), found.tolist(), strict=True):
        limit = max(-row.min() / top, row.max() / (top - 1))
        tried = [objective(row, limit * (1 - 0.8 * k / 39), -top, top - 1) for k in range(40)]
        assert objective(row, step, -top, top - 1) == pytest.approx(min(tried), rel=1e-3)
        assert objective(row, step, -top, top - 1) <= tried[0] * (1 + 1e-4)


def brute_force_affine(row: np.ndarray, bits: int, candidates: int) -> float:
    low, high = min(row.min(), 0.0), max(row.max(), 0.0)
    factors = [1 - 0.75 * k / (candidates - 1) for k in range(candidates)]
    levels = 2**bits - 1

    def error(lo: float, hi: float) -> float:
        step = (hi - lo) / levels
        zero = np.clip(np.rint(-lo / step), 0, levels)
        return objective(row, step, -zero, levels - zero)

    def best_high(lo: float) -> float:
        return min((error(lo, high * f), k, high * f) for k, f in enumerate(factors))[2]

    upper = best_high(low)
    lower = min((error(low * f, upper), k, low * f) for k, f in enumerate(factors))[2] if low < 0 else low
    return error(lower, best_high(lower))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("positive", [False, True])
def test_affine_equals_a_loop_over_the_same_candidates(bits: int, positive: bool) -> None:
    x = rows(seed=bits).abs() if positive else rows(seed=bits) + 0.3
    delta, zero = search_affine(x, bits, candidates=9)
    for row, step, z in zip(as_rows(x), delta.tolist(), zero.tolist(), strict=True):
        got = objective(row, step, -z, 2**bits - 1 - z)
        assert got == pytest.approx(brute_force_affine(row, bits, 9), rel=2e-3)
        if positive:
            assert z == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_affine_is_never_worse_than_min_max(bits: int) -> None:
    for seed in range(5):
        x = rows(seed=seed)
        delta, zero = search_affine(x, bits)
        plain, plain_zero = affine_range(x.amin(1), x.amax(1), bits)
        for row, s, z, s0, z0 in zip(as_rows(x), *(t.tolist() for t in (delta, zero, plain, plain_zero)), strict=True):
            top = 2**bits - 1
            assert objective(row, s, -z, top - z) <= objective(row, s0, -z0, top - z0) * (1 + 1e-4)


@pytest.mark.parametrize("search", [search_symmetric, search_affine, lambda x, b: search_log(x.abs(), b, ADALOG_TAUS)])
def test_rows_are_independent(search: object) -> None:
    x = rows(4)
    x[1] = x[1].abs()
    together = search(x, 4)  # type: ignore[operator]
    together = together if isinstance(together, tuple) else (together,)
    for i in range(4):
        alone = search(x[i : i + 1], 4)  # type: ignore[operator]
        alone = alone if isinstance(alone, tuple) else (alone,)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[i : i + 1], b)


def test_limits_stand_for_values_that_were_not_sampled() -> None:
    x = torch.linspace(0, 1, 50)[None]
    delta, zero = search_affine(x, 8, candidates=1, limits=(torch.tensor([-1.0]), torch.tensor([3.0])))
    assert delta.item() == pytest.approx(4 / 255)
    assert zero.item() == 64


def test_rows_of_zeros_give_usable_steps() -> None:
    zeros = torch.zeros(2, 8)
    for delta in (search_symmetric(zeros, 4), search_affine(zeros, 4)[0], search_log(zeros, 4, (1.0,))[0]):
        assert bool((delta > 0).all())
        assert bool(delta.isfinite().all())


@pytest.mark.parametrize("taus", [(1.0,), (0.5,), ADALOG_TAUS])
def test_log_equals_a_loop(taus: tuple[float, ...]) -> None:
    x = torch.rand(3, 80, generator=torch.Generator().manual_seed(0)) ** 3
    delta, tau = search_log(x, 3, taus, candidates=5)

    def error(row: np.ndarray, d: float, t: float) -> float:
        q = np.clip(np.rint(-np.log2(row / d) / t), 0, 7)
        return float((np.abs(row - d * 2 ** (-t * q) * (q < 7)) ** P).sum())

    for row, d, t in zip(as_rows(x), delta.tolist(), tau.tolist(), strict=True):
        tried = [error(row, row.max() * 2 ** (-k / 2), exponent) for exponent in taus for k in range(5)]
        assert error(row, d, t) == pytest.approx(min(tried), rel=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_one_zero_point_for_all_rows_is_the_best_of_those_tried(bits: int) -> None:
    x = rows(4) + torch.tensor([0.0, 0.1, 3.0, 10.0])[:, None]
    levels = 2**bits - 1
    _, zeros = search_affine(x, bits)
    assert len(zeros.unique()) > 2  # type: ignore[no-untyped-call]
    delta, common = search_common_zero(x, bits, zeros, candidates=8)
    assert len(common.unique()) == 1  # type: ignore[no-untyped-call]
    found = [
        objective(r, s, -z, levels - z) for r, s, z in zip(as_rows(x), delta.tolist(), common.tolist(), strict=True)
    ]
    power = [float((np.abs(row) ** P).sum()) for row in as_rows(x)]

    def best(row: np.ndarray, zero: float) -> float:
        cover = max(-row.min() / zero if zero else 0.0, row.max() / (levels - zero) if zero < levels else 0.0)
        return min(objective(row, cover * (1 - 0.75 * k / 7), -zero, levels - zero) for k in range(8))

    tried = np.rint(np.quantile(zeros.numpy(), np.linspace(0, 1, 5)))
    sums = [sum(best(row, zero) / p for row, p in zip(as_rows(x), power, strict=True)) for zero in tried]
    assert sum(f / p for f, p in zip(found, power, strict=True)) == pytest.approx(min(sums), rel=1e-3)


def test_a_common_zero_point_leaves_rows_without_negative_values_their_whole_range() -> None:
    x = rows().abs()
    delta, zeros = search_affine(x, 8)
    common = search_common_zero(x, 8, zeros)
    torch.testing.assert_close(common[0], delta, rtol=1e-4, atol=0)
    assert not common[1].any()
