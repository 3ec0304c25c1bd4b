"""Binned fits of truncated tails, against samples, brute force and the package `powerlaw`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings

import numpy as np
import numpy.typing as npt
import powerlaw
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from torch import Tensor

from tcaq_lightning.errors import UserError
from tcaq_lightning.methods.daq_tails import TailFit, fit_tail, fit_tails
from tcaq_lightning.quantizers.observers import LogHistogram

Array = npt.NDArray[np.float64]
EDGES = LogHistogram(1).edges


def power_law(alpha: float, xmin: float, size: int, seed: int = 0) -> Array:
    """Samples of x^-alpha on [xmin, 1] by inverse CDF."""
    u = np.random.default_rng(seed).random(size)
    if alpha == 1:
        return xmin ** (1 - u)
    return (xmin ** (1 - alpha) + u * (1 - xmin ** (1 - alpha))) ** (1 / (1 - alpha))


def exponential(rate: float, size: int, seed: int = 0) -> Array:
    """Samples of e^(-rate x) on [0, 1] by inverse CDF."""
    u = np.random.default_rng(seed).random(size)
    return u if rate == 0 else -np.log1p(-u * -np.expm1(-rate)) / rate


def counts_of(samples: Array) -> Tensor:
    histogram = LogHistogram(1)
    histogram.update(torch.from_numpy(samples)[None], torch.tensor([0]))
    return histogram.counts[0]


def fit(samples: Array, **limits: float) -> TailFit:
    return fit_tail(counts_of(samples), EDGES, **limits)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 0.999, 1.0, 1.5, 2.0, 3.0, 4.0])
def test_alpha_is_recovered_and_the_power_law_preferred(alpha: float) -> None:
    samples = power_law(alpha, 1e-2, 100_000)
    result = fit(samples)
    error = 1 / np.std(np.log(samples[samples >= result.xmin])) / math.sqrt(result.n_tail)
    assert abs(result.alpha - alpha) < 4 * error
    assert result.ks < 0.01
    assert result.reliable
    if alpha >= 0.5:  # alpha 0 is the uniform density, a member of both families; alpha -1 is close to both
        assert result.R > 0
        assert result.kind == "log"
        assert result.p_value < 0.01


@pytest.mark.parametrize("rate", [3.0, 10.0, 30.0, 300.0, 3000.0])
def test_rate_is_recovered_and_the_exponential_preferred(rate: float) -> None:
    samples = exponential(rate, 200_000)
    result = fit(samples)
    error = 1 / np.std(samples[samples >= result.xmin]) / math.sqrt(result.n_tail)
    assert abs(result.rate - rate) < 4 * error
    assert result.R < 0
    assert result.kind == "uniform"


@pytest.mark.parametrize("xmin", [1e-2, 1e-3])
def test_xmin_is_recovered_where_a_flat_body_ends(xmin: float) -> None:
    body = xmin * np.random.default_rng(1).random(50_000)
    result = fit(np.concatenate([body, power_law(2.0, xmin, 50_000)]))
    assert xmin / 1.15 < result.xmin < 2 * xmin
    assert abs(result.alpha - 2.0) < 0.03
    assert result.tail_share == result.n_tail / 100_000


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 2.5])
def test_power_law_agrees_with_package_powerlaw(alpha: float) -> None:
    samples = power_law(alpha, 1e-3, 20_000)
    ours = fit(samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Forced, because powerlaw 2.0 takes the closed form of the unbounded power law for 1.5 < alpha <= 3.
        theirs = powerlaw.Power_Law(
            data=samples, xmin=ours.xmin, xmax=1.0, force_numerical_fit=True, parameter_ranges={"alpha": [1.01, 9]}
        )
        loglik = theirs.loglikelihoods(samples[samples >= ours.xmin])
    assert len(loglik) == ours.n_tail
    assert ours.alpha == pytest.approx(theirs.alpha, abs=2e-3)
    assert ours.loglik_power_law == pytest.approx(float(np.mean(loglik)), abs=2e-3)


@pytest.mark.parametrize(
    "samples",
    [power_law(1.5, 1e-3, 20_000), power_law(2.0, 1e-3, 20_000), power_law(2.5, 1e-2, 20_000), exponential(40, 50_000)],
    ids=["alpha 1.5", "alpha 2", "alpha 2.5", "exponential"],
)
def test_likelihood_ratio_agrees_with_package_powerlaw(samples: Array) -> None:
    # Its exponential is not truncated at 1: these rates leave nothing there, so the two agree.
    ours = fit(samples)
    tail = samples[samples >= ours.xmin]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = powerlaw.Fit(samples, xmin=ours.xmin, xmax=1.0, verbose=0)
        free = powerlaw.Power_Law(
            data=samples, xmin=ours.xmin, xmax=1.0, force_numerical_fit=True, parameter_ranges={"alpha": [1.01, 20]}
        )
        rough, _ = theirs.distribution_compare("power_law", "exponential")
        total, p_value = powerlaw.loglikelihood_ratio(
            free.loglikelihoods(tail), theirs.exponential.loglikelihoods(tail).astype(np.float64)
        )
        z, _ = powerlaw.loglikelihood_ratio(
            free.loglikelihoods(tail),
            theirs.exponential.loglikelihoods(tail).astype(np.float64),
            normalized_ratio=True,
        )
    assert np.sign(rough) == np.sign(ours.R)
    if ours.R > 0:  # for the exponential its power law stops at its limit, alpha = 3
        assert pytest.approx(rough / ours.n_tail, rel=0.02) == ours.R
    assert ours.rate == pytest.approx(theirs.exponential.Lambda, rel=0.02)
    assert pytest.approx(total / ours.n_tail, rel=0.01, abs=1e-3) == ours.R
    assert ours.z == pytest.approx(z, rel=0.03, abs=0.2)
    assert ours.p_value == pytest.approx(p_value, abs=0.02)


def bin_masses(density: str, parameter: float, edges: Array) -> Array:
    """Probabilities of bins under a density truncated to [edges[0], 1], by quadrature."""
    functions = {"power law": lambda x: (x / edges[0]) ** -parameter, "exponential": lambda x: np.exp(-parameter * x)}
    masses = [integrate.quad(functions[density], a, b, epsabs=0)[0] for a, b in itertools.pairwise(edges)]
    return np.array(masses) / np.sum(masses)


@pytest.mark.parametrize("samples", [power_law(1.5, 1e-2, 3000), exponential(8.0, 3000), power_law(1.0, 0.05, 3000)])
def test_fits_maximise_the_binned_likelihood_found_by_brute_force(samples: Array) -> None:
    histogram = LogHistogram(1, low=1e-3, bins_per_decade=12)
    histogram.update(torch.from_numpy(samples)[None], torch.tensor([0]))
    result = fit_tail(histogram.counts[0], histogram.edges, min_bins=5)
    all_edges = histogram.edges.numpy()
    first = int(np.argmin(np.abs(all_edges - result.xmin)))
    n, edges = histogram.counts[0, first:].numpy(), all_edges[first:]
    logliks = {}
    for density, found, bounds in (("power law", result.alpha, (-5, 9)), ("exponential", result.rate, (-5, 50))):

        def loss(parameter: float, density: str = density) -> float:
            return -float(n @ np.log(bin_masses(density, parameter, edges) / np.diff(edges))) / n.sum()

        best = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-7})
        assert found == pytest.approx(best.x, abs=1e-4)
        logliks[density] = -best.fun
    assert result.loglik_power_law == pytest.approx(logliks["power law"], abs=1e-9)
    assert result.loglik_exponential == pytest.approx(logliks["exponential"], abs=1e-9)
    assert pytest.approx(logliks["power law"] - logliks["exponential"], abs=1e-9) == result.R

    def normal_loss(parameters: Array) -> float:
        mean, deviation = parameters[0], np.exp(parameters[1])
        cdf = stats.norm.cdf(np.log(edges), mean, deviation)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_mass = np.log(np.diff(cdf) / (cdf[-1] - cdf[0]) / np.diff(edges))
        loss = -float(n @ np.where(n > 0, log_mass, 0)) / n.sum()
        return loss if np.isfinite(loss) else 1e9

    lognormal = optimize.minimize(normal_loss, [-2.0, 0.5], method="Nelder-Mead", options={"maxiter": 2000})
    assert result.loglik_lognormal == pytest.approx(-lognormal.fun, abs=2e-4)


def test_xmin_minimises_the_kolmogorov_smirnov_distance_found_in_a_loop() -> None:
    samples = np.concatenate([power_law(2.0, 1e-2, 2000), 1e-2 * np.random.default_rng(2).random(1000)])
    histogram = LogHistogram(1, low=1e-4, bins_per_decade=10)
    histogram.update(torch.from_numpy(samples)[None], torch.tensor([0]))
    result = fit_tail(histogram.counts[0], histogram.edges)
    n, edges = histogram.counts[0, 1:].numpy(), histogram.edges[1:].numpy()
    best = (math.inf, 0.0)
    for first in range(len(n)):
        tail = n[first:]
        if n[first] == 0 or tail.sum() < max(50, 0.05 * n.sum()) or (tail > 0).sum() < 10:
            continue
        y = np.log(edges[first:])

        def cdf(alpha: float, y: Array = y) -> Array:
            return (np.exp((1 - alpha) * y) - np.exp((1 - alpha) * y[0])) / (1 - np.exp((1 - alpha) * y[0]))

        alpha = optimize.minimize_scalar(
            lambda a, tail=tail, cdf=cdf: -tail @ np.log(np.maximum(np.diff(cdf(a)), 1e-300)),
            bounds=(1.001, 6),
            method="bounded",
        ).x
        distance = np.abs(np.cumsum(tail) / tail.sum() - cdf(alpha)[1:]).max()
        best = min(best, (distance, edges[first]))
    assert result.ks == pytest.approx(best[0], abs=1e-5)
    assert result.xmin == pytest.approx(best[1])


@pytest.mark.parametrize(
    ("alpha", "rate", "xmin"),
    [(1.5, 10.0, 1e-3), (1.0, 0.0, 0.1), (1 + 1e-9, 1e-9, 1e-4), (-3.0, -20.0, 0.2), (7.0, 5000.0, 1e-2)],
)
def test_densities_integrate_to_one_over_the_bins(alpha: float, rate: float, xmin: float) -> None:
    result = TailFit(alpha, rate, xmin, 0.0, 100, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, True)
    edges = np.geomspace(xmin, 1, 40)
    for density in (result.power_law_density, result.exponential_density):
        masses = [
            integrate.quad(lambda x, f=density: float(f(torch.tensor(x, dtype=torch.float64))), a, b, epsabs=1e-13)[0]
            for a, b in itertools.pairwise(edges)
        ]
        assert sum(masses) == pytest.approx(1.0, abs=1e-9)


def test_counts_scaled_by_k_leave_the_fit_and_scale_z_by_root_k() -> None:
    counts = counts_of(power_law(1.7, 1e-3, 5000))
    one, many = fit_tail(counts, EDGES), fit_tail(1_000_000 * counts, EDGES)
    for name in ("alpha", "rate", "xmin", "ks", "tail_share", "loglik_power_law", "loglik_lognormal", "R"):
        assert getattr(many, name) == pytest.approx(getattr(one, name), rel=1e-9)
    assert many.z == pytest.approx(1000 * one.z, rel=1e-9)
    assert many.n_tail == 1_000_000 * one.n_tail


def test_underflow_counts_in_the_share_but_not_in_the_fit() -> None:
    counts = counts_of(power_law(1.7, 1e-3, 5000))
    alone = fit_tail(counts, EDGES)
    counts[0] = 10_000_000
    buried = fit_tail(counts, EDGES)
    assert buried == dataclasses.replace(alone, tail_share=alone.n_tail / 10_005_000)


def test_groups_do_not_influence_each_other() -> None:
    rows = [counts_of(power_law(1.5, 1e-4, 3000)), counts_of(exponential(30, 3000)), torch.zeros(321).long()]
    together = fit_tails(torch.stack(rows), EDGES)
    for alone, row in zip(together, rows, strict=True):
        for one, other in zip(dataclasses.astuple(alone), dataclasses.astuple(fit_tail(row, EDGES)), strict=True):
            assert one == pytest.approx(other, rel=1e-6, abs=1e-9)


def one_bin(count: int, index: int) -> Tensor:
    counts = torch.zeros(321, dtype=torch.int64)
    counts[index] = count
    return counts


@pytest.mark.parametrize(
    "counts",
    [
        one_bin(0, 5),
        one_bin(10**9, 0),
        one_bin(10**9, 1),
        one_bin(10**9, 150),
        one_bin(10**9, 320),
        counts_of(power_law(1.5, 1e-3, 40)),
        one_bin(500, 20) + one_bin(500, 30),
    ],
    ids=["empty", "all zeros", "first bin", "one bin", "all ones", "too few values", "two bins"],
)
def test_degenerate_groups_are_uniform_and_unreliable(counts: Tensor) -> None:
    result = fit_tail(counts, EDGES)
    assert not result.reliable
    assert result.kind == "uniform"
    assert result.R == 0
    assert result.p_value == 1
    assert all(math.isfinite(value) for value in dataclasses.astuple(result))


@st.composite
def histograms(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    low = draw(st.sampled_from([1e-8, 1e-3, 0.1]))
    histogram = LogHistogram(1, low=low, bins_per_decade=draw(st.sampled_from([5, 40, 200])))
    size = st.one_of(st.integers(0, 3), st.integers(0, 10**4), st.integers(0, 10**12))
    at = st.integers(0, histogram.counts.shape[1] - 1)
    for index, count in draw(st.dictionaries(at, size, max_size=60)).items():
        histogram.counts[0, index] = count
    return histogram.counts, histogram.edges


@given(histogram=histograms(), min_bins=st.integers(2, 12), min_share=st.sampled_from([0.0, 0.05, 1.0]))
@settings(max_examples=60, deadline=None)
def test_arbitrary_counts_never_give_nan(histogram: tuple[Tensor, Tensor], min_bins: int, min_share: float) -> None:
    counts, edges = histogram
    (result,) = fit_tails(counts, edges, min_tail=1, min_share=min_share, min_bins=min_bins)
    assert all(math.isfinite(value) for value in dataclasses.astuple(result))
    assert 0 <= result.p_value <= 1
    assert 0 <= result.ks <= 1
    assert result.n_tail <= counts.sum()
    assert result.loglik_lognormal >= result.loglik_power_law
    assert result.reliable or result.kind == "uniform"


@pytest.mark.parametrize(
    ("counts", "edges"),
    [
        (torch.zeros(2, 321), EDGES),
        (torch.zeros(2, 320, dtype=torch.int64), EDGES),
        (torch.zeros(2, 321, dtype=torch.int64), torch.linspace(0, 1, 322)),
    ],
    ids=["float counts", "one column short", "linear edges"],
)
def test_wrong_input_is_refused(counts: Tensor, edges: Tensor) -> None:
    with pytest.raises(UserError):
        fit_tails(counts, edges)


def test_wrong_limits_are_refused() -> None:
    with pytest.raises(UserError, match="min_bins"):
        fit_tail(one_bin(100, 3), EDGES, min_bins=1)
