"""Tails of attention probabilities: binned maximum-likelihood fits of a power law and an exponential.

A power law in x is an exponential in y = ln x. Both families compared here are therefore one density,
exp(slope * position) on an interval of finite length: for the power law the position is ln x and the slope 1 - alpha,
for the exponential the position is x and the slope -rate. Everything below is written once, for that density.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tcaq_lightning.errors import UserError


@dataclass(frozen=True)
class TailFit:
    """Power law against exponential on the tail [xmin, 1] of one histogram, both truncated to that interval.

    Log-likelihoods are means per value, of the density averaged over each bin. Where a histogram gives no tail to fit
    (too few values or bins), `reliable` is False, the numbers are neutral (R = 0, p_value = 1) and the kind is uniform.
    """

    alpha: float
    """Exponent of the power law x^-alpha; any real number, since the interval is finite."""
    rate: float
    """Rate lambda of the exponential e^(-lambda x); any real number."""
    xmin: float
    """Start of the tail: the bin edge with the least Kolmogorov-Smirnov distance of the power law."""
    ks: float
    """That distance, over the bin edges."""
    n_tail: int
    """Number of values at or above xmin."""
    tail_share: float
    """Their share of all values, the underflow bin included."""
    loglik_power_law: float
    loglik_exponential: float
    loglik_lognormal: float
    """Reported only: the log-normal contains the power law as a limit and so is never worse."""
    R: float
    """loglik_power_law - loglik_exponential; positive where the power law fits better."""
    z: float
    """Vuong's statistic of R; the values of one softmax row are not independent, so it overstates."""
    p_value: float
    """Two-sided p value of z."""
    reliable: bool

    @property
    def kind(self) -> Literal["log", "uniform"]:
        """Quantizer family this fit asks for: logarithmic where the power law wins (R > 0), else uniform."""
        return "log" if self.R > 0 else "uniform"

    def power_law_density(self, x: Tensor) -> Tensor:
        """Density of the fitted power law at x in [xmin, 1], integrating to 1 over it."""
        y = x.double().log()
        start = math.log(self.xmin)
        return (_log_density(torch.tensor(1.0 - self.alpha).double(), y - start, -start) - y).exp()

    def exponential_density(self, x: Tensor) -> Tensor:
        """Density of the fitted exponential at x in [xmin, 1], integrating to 1 over it."""
        slope = torch.tensor(-self.rate).double()
        return _log_density(slope, x.double() - self.xmin, 1.0 - self.xmin).exp()


def fit_tails(
    counts: Tensor, edges: Tensor, min_tail: int = 50, min_share: float = 0.05, min_bins: int = 10
) -> list[TailFit]:
    """Fit every row of a log-spaced histogram by binned maximum likelihood.

    xmin is the non-empty bin's edge that minimises the Kolmogorov-Smirnov distance of the power law (Clauset, Shalizi,
    Newman 2009, section 3.3); there the power law, the exponential and the log-normal, all truncated to [xmin, 1], are
    compared, with Vuong's test (Vuong 1989; Clauset et al., appendix C) between the first two.

    Args:
        counts: (G, 1 + bins) integers, column 0 the underflow bin.
        edges: (2 + bins,) 0, then logarithmically spaced up to 1 (`LogHistogram.edges`).
        min_tail: fewest values a tail may hold.
        min_share: least share of the values outside the underflow bin that a tail may hold. Small ones let xmin run out
            to where both families fit: of 150 exponential samples of 5000 values each, R got the wrong sign in 44 with
            0.01, in 24 with 0.05, in 18 with 0.1; of 150 with 200,000 values in at most one.
        min_bins: fewest non-empty bins of a tail, at least 2.

    Returns:
        One fit per row.

    Raises:
        UserError: shapes, edges or limits do not fit together.
    """
    _check(counts, edges, min_tail, min_share, min_bins)
    edges, counts = edges.double().cpu(), counts.cpu()
    n = counts[:, 1:].double()  # (G, bins)
    starts = _choose_starts(n, min_tail, min_share, min_bins)
    fits = [_no_tail(float(edges[1]))] * len(n)
    rows = starts.reliable.nonzero().flatten()
    if len(rows):
        first, theta, distance = starts.first[rows, None], starts.theta[rows, None], starts.distance[rows, None]
        columns = _compare_on_tails(n[rows], edges, first, theta) | {"ks": distance}
        sizes = columns.pop("n_tail").flatten().long().tolist()
        table = {name: column.flatten().tolist() for name, column in columns.items()}
        total = counts.sum(1).tolist()
        for i, g in enumerate(rows.tolist()):
            numbers = {name: column[i] for name, column in table.items()}
            fits[g] = TailFit(n_tail=sizes[i], tail_share=sizes[i] / total[g], reliable=True, **numbers)
    return fits


def _no_tail(xmin: float) -> TailFit:
    """What stands for a group without a tail to fit."""
    return TailFit(
        alpha=1.0,
        rate=0.0,
        xmin=xmin,
        ks=1.0,
        n_tail=0,
        tail_share=0.0,
        loglik_power_law=0.0,
        loglik_exponential=0.0,
        loglik_lognormal=0.0,
        R=0.0,
        z=0.0,
        p_value=1.0,
        reliable=False,
    )


def _compare_on_tails(n: Tensor, edges: Tensor, first: Tensor, theta: Tensor) -> dict[str, Tensor]:
    """Fit all three families to tails that begin at known bins, with Vuong's test between the first two.

    Args:
        n: (G, bins) float64 counts without the underflow bin.
        edges: (2 + bins,) float64.
        first: (G, 1) first bin of each tail.
        theta: (G, 1) log ratio of neighbouring bins' probabilities under the power law.

    Returns:
        (G,) or (G, 1) each, by their names in `TailFit`.
    """
    y = edges[1:].log()
    y[-1] = 0.0
    left, width = edges[1:-1], edges[1:].diff()
    tail = torch.where(torch.arange(n.shape[1]) >= first, n, 0.0)  # (G, bins)
    n_tail = tail.sum(1)
    weight = tail / n_tail[:, None]
    xmin, ymin = edges[1:][first], y[first]
    slope = theta * n.shape[1] / -y[0]  # 1 - alpha
    rate = -_exponential_slope(weight, left - xmin, width, 1 - xmin)
    inside = weight > 0
    power_law = torch.where(inside, _log_mass(slope, y[:-1] - ymin, y.diff(), -ymin) - width.log(), 0.0)
    exponential = torch.where(inside, _log_mass(-rate, left - xmin, width, 1 - xmin) - width.log(), 0.0)
    loglik_power_law = (weight * power_law).sum(1)
    lognormal = _lognormal_loglik(weight, slope, y, ymin) - (weight * width.log()).sum(1)
    difference = power_law - exponential
    ratio = (weight * difference).sum(1)
    spread = (weight * (difference - ratio[:, None]).square()).sum(1).sqrt()
    z = torch.where(spread > 0, n_tail.sqrt() * ratio / spread, 0.0)
    return {
        "alpha": 1 - slope,
        "rate": rate,
        "xmin": xmin,
        "n_tail": n_tail,
        "loglik_power_law": loglik_power_law,
        "loglik_exponential": (weight * exponential).sum(1),
        "loglik_lognormal": torch.maximum(lognormal, loglik_power_law),
        "R": ratio,
        "z": z,
        "p_value": torch.erfc(z.abs() / math.sqrt(2)),
    }


def fit_tail(counts: Tensor, edges: Tensor, min_tail: int = 50, min_share: float = 0.05, min_bins: int = 10) -> TailFit:
    """Fit one histogram: `fit_tails` for counts of shape (1 + bins,).

    Args:
        counts: (1 + bins,).
        edges: (2 + bins,) `LogHistogram.edges`.
        min_tail: as in `fit_tails`.
        min_share: as in `fit_tails`.
        min_bins: as in `fit_tails`.
    """
    return fit_tails(counts[None], edges, min_tail, min_share, min_bins)[0]


class _Starts(NamedTuple):
    """Where each group's tail begins."""

    first: Tensor
    """(G,) int64 first bin of the tail."""
    theta: Tensor
    """(G,) log ratio of neighbouring bins' probabilities there."""
    distance: Tensor
    """(G,) Kolmogorov-Smirnov distance there."""
    reliable: Tensor
    """(G,) bool: the group has a tail to fit."""


def _choose_starts(n: Tensor, min_tail: int, min_share: float, min_bins: int) -> _Starts:
    """Fit the power law from every bin on, and keep the start with the least Kolmogorov-Smirnov distance.

    On logarithmic bins a power law is a geometric distribution over the bins of the tail: number, mean index and length
    are all it needs, so every candidate start of every group is fitted at once.

    Args:
        n: (G, bins) float64 counts without the underflow bin.
        min_tail: fewest values a tail may hold.
        min_share: least share of the values that a tail may hold.
        min_bins: fewest non-empty bins of a tail.
    """
    groups, bins = n.shape
    position = torch.arange(bins, dtype=torch.float64)
    tail_n, tail_bins, tail_index = (_suffix_sum(v) for v in (n, (n > 0).double(), n * position))
    valid = (n > 0) & (tail_n >= min_tail) & (tail_n >= min_share * tail_n[:, :1]) & (tail_bins >= min_bins)
    length = (bins - position).expand_as(n)[valid]
    mean = (tail_index[valid] / tail_n[valid]) - position.expand_as(n)[valid]
    theta = torch.zeros_like(n)
    theta[valid] = _increasing_root(
        lambda s: length * _mean_position(length * s) - _mean_position(s) - mean, torch.full_like(mean, 40)
    )
    first, distance = torch.zeros(groups, dtype=torch.int64), n.new_ones(groups)
    reliable = valid.any(1)
    for g in reliable.nonzero().flatten().tolist():  # one (candidates, bins) table at a time
        candidates = valid[g].nonzero().flatten()
        ks = _ks_distances(tail_n[g], theta[g], candidates)
        first[g], distance[g] = candidates[ks.argmin()], ks.min()
    return _Starts(first, theta.gather(1, first[:, None]).flatten(), distance, reliable)


def _check(counts: Tensor, edges: Tensor, min_tail: int, min_share: float, min_bins: int) -> None:
    if counts.ndim != 2 or counts.is_floating_point() or edges.shape != (counts.shape[1] + 1,) or counts.shape[1] < 2:
        raise UserError(
            "counts must be integers of shape (groups, 1 + bins) with one more edge than columns, got "
            f"{counts.dtype} {tuple(counts.shape)} and {tuple(edges.shape)} edges"
        )
    inner = edges[1:].double()
    steps = inner.log().diff()
    if edges[0] != 0 or abs(float(inner[-1]) - 1) > 1e-9 or not torch.allclose(steps, steps[:1], rtol=1e-6):
        raise UserError("edges must be 0, then logarithmically spaced up to 1; take them from LogHistogram.edges")
    if min_tail < 1 or not 0 <= min_share <= 1 or min_bins < 2:
        raise UserError(
            "min_tail must be at least 1, min_share in [0, 1] and min_bins at least 2, "
            f"got {min_tail}, {min_share} and {min_bins}"
        )


def _log_mean_exp(u: Tensor) -> Tensor:
    """log of the integral of e^(u t) over t in [0, 1]."""
    size = u.abs().clamp_min(1e-300)
    return u.clamp_min(0.0) + (-torch.expm1(-size) / size).log()


def _mean_position(u: Tensor) -> Tensor:
    """Mean of t in [0, 1] under a density proportional to e^(u t): the derivative of `_log_mean_exp`."""
    small, square = u.abs() < 1e-2, u.square()
    series = 0.5 + u * (1 / 12 - square * (1 / 720 - square / 30240))
    safe = torch.where(small, 1.0, u)
    return torch.where(small, series, -(torch.expm1(-safe).reciprocal() + safe.reciprocal()))


def _log_density(slope: Tensor, offset: Tensor, length: float) -> Tensor:
    """Log density at `offset` into an interval of `length`, for e^(slope * position) truncated to it."""
    return slope * offset - math.log(length) - _log_mean_exp(slope * length)


def _log_mass(slope: Tensor, offset: Tensor, width: Tensor, length: Tensor) -> Tensor:
    """Log probability of a bin of `width` that starts at `offset`, under the density of `_log_density`."""
    return slope * offset + (width / length).log() + _log_mean_exp(slope * width) - _log_mean_exp(slope * length)


def _suffix_sum(values: Tensor) -> Tensor:
    return values.flip(-1).cumsum(-1).flip(-1)


def _increasing_root(function: Callable[[Tensor], Tensor], bound: Tensor) -> Tensor:
    """Roots in [-bound, bound] of an increasing function, elementwise, by bisection down to rounding error."""
    low, high = -bound, bound
    for _ in range(64):
        middle = (low + high) / 2
        above = function(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def _ks_distances(tail_n: Tensor, theta: Tensor, candidates: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance of the fitted power law for each candidate xmin, over the upper edges of the bins.

    Args:
        tail_n: (bins,) number of values from each bin on.
        theta: (bins,) log ratio of neighbouring bins' probabilities in the fit that starts at each bin.
        candidates: (C,) first bins to consider.

    Returns:
        (C,) distances.
    """
    bins = tail_n.shape[0]
    covered = torch.arange(1, bins + 1) - candidates[:, None]  # (C, bins) bins from xmin to the edge
    length = (bins - candidates)[:, None]
    empirical = 1 - torch.cat([tail_n[1:], tail_n.new_zeros(1)]) / tail_n[candidates][:, None]
    rate = theta[candidates][:, None]
    # Rising fits are mirrored, so that exponents stay negative; the floor stands in for the limit at 0.
    decay = -rate.abs().clamp_min(1e-12)
    fraction = torch.expm1(decay * torch.where(rate > 0, length - covered, covered)) / torch.expm1(decay * length)
    model = torch.where(rate > 0, 1 - fraction, fraction)
    return torch.where(covered > 0, (empirical - model).abs(), 0.0).amax(1)


def _exponential_slope(weight: Tensor, offset: Tensor, width: Tensor, length: Tensor) -> Tensor:
    """Maximum-likelihood slope of e^(slope * x) from binned values: (G, bins) weights that sum to 1 -> (G, 1).

    The score is the model's mean minus the data's, whose positions within the bins are themselves expected under the
    slope. It rises with the slope because truncation to a bin only ever shrinks the variance of a log-concave density.
    """

    def score(v: Tensor) -> Tensor:
        slope = v.sinh()  # a scale that resolves slopes from 1e-16 to 1 / width
        data = (weight * (offset + width * _mean_position(slope * width))).sum(1, keepdim=True)
        return length * _mean_position(slope * length) - data

    return _increasing_root(score, torch.asinh(60 / width.min()).expand_as(length)).sinh()


def _lognormal_loglik(weight: Tensor, slope: Tensor, y: Tensor, ymin: Tensor) -> Tensor:
    """Mean log probability of the bins under the best log-normal truncated to [xmin, 1], by Newton's method.

    In y = ln x it is exp(a T1(t) + b T2(t)), t in [-1, 1] over the tail, T1 and T2 Legendre polynomials, b <= 0; b = 0
    is the power law. Bins are integrated by Gauss's rule with three nodes.

    Args:
        weight: (G, bins) share of the tail's values in each bin.
        slope: (G, 1) 1 - alpha of the power law, where the iteration starts.
        y: (bins + 1,) logarithms of the edges.
        ymin: (G, 1) logarithm of xmin.

    Returns:
        (G,) log-likelihoods, -inf where no log-normal is better than the power law.
    """
    node = torch.tensor([-math.sqrt(0.6), 0.0, math.sqrt(0.6)], dtype=y.dtype)
    node_y = (y[:-1, None] + y[1:, None]) / 2 + node * (y[1:, None] - y[:-1, None]) / 2  # (bins, 3)
    log_w = torch.tensor([5 / 18, 8 / 18, 5 / 18], dtype=y.dtype).log()
    t = 1 - 2 * node_y / ymin[..., None]  # (G, bins, 3)
    log_w = torch.where(t >= -1, log_w, -math.inf)
    t = t.clamp_min(-1.0)
    statistics = torch.stack([t, (3 * t.square() - 1) / 2])  # (2, G, bins, 3)

    def evaluate(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        exponent = (parameters.T[..., None, None] * statistics).sum(0) + log_w
        log_z = exponent.flatten(1).logsumexp(1)[:, None]
        log_bin = exponent.logsumexp(2)  # (G, bins)
        value = torch.where(weight > 0, weight * (log_bin - log_z), 0.0).sum(1)
        model = (exponent - log_z[..., None]).exp()
        data = torch.where(weight[..., None] > 0, weight[..., None] * (exponent - log_bin[..., None]).exp(), 0.0)
        gradient = ((data - model) * statistics).sum((2, 3)).T  # (G, 2)
        centred = statistics - (model * statistics).sum((2, 3), keepdim=True)
        covariance = torch.einsum("ugbq,vgbq,gbq->guv", centred, centred, model)
        covariance = covariance + 1e-14 * torch.eye(2, dtype=y.dtype)
        return value, gradient, torch.linalg.solve_ex(covariance, gradient).result

    parameters = torch.cat([-slope * ymin / 2, torch.zeros_like(slope)], dim=1)  # (G, 2)
    value, gradient, direction = evaluate(parameters)
    scale = torch.ones_like(value)
    for _ in range(60):
        if float((gradient * direction).sum(1).amax()) < 1e-12:
            break
        proposal = parameters + scale[:, None] * direction
        new_value, new_gradient, new_direction = evaluate(proposal)
        better = new_value > value
        parameters = torch.where(better[:, None], proposal, parameters)
        gradient = torch.where(better[:, None], new_gradient, gradient)
        direction = torch.where(better[:, None], new_direction, direction)
        value = torch.where(better, new_value, value)
        scale = torch.where(better, (2 * scale).clamp_max(1.0), scale / 2)
    return torch.where(parameters[:, 1] < 0, value, -math.inf)
