"""Search of quantization ranges: minimise sum |x - x^|^p over candidates, all channels or groups at once.

p = 2.4 as in AdaRound's and BRECQ's code. Published implementations loop over channels in Python.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tcaq_lightning.quantizers.logarithmic import log_codes, log_values
from tcaq_lightning.quantizers.uniform import affine_range

NORM = 2.4
"""p where nothing else is said; `quantization.range_norm` sets it."""
CPU_CHUNK, DEVICE_CHUNK = 1 << 18, 1 << 24
"""Elements of the largest intermediate tensor: near a core on a CPU, bounded memory elsewhere."""


def powers(error: Tensor, norm: float) -> Tensor:
    """|error|^norm, in place; through logarithms since a vectorised pow takes over twice as long on a CPU."""
    return error.square_() if norm == 2 else error.abs_().log2_().mul_(norm).exp2_()


def _errors(rows: Tensor, step: Tensor, low: Tensor, high: Tensor, norm: float) -> Tensor:
    """sum |x - x^|^p of every row under every candidate: rows (R, N), others (R, K) -> (R, K)."""
    size, candidates = max(1, rows.shape[1]), step.shape[1]
    errors = torch.empty(step.shape, dtype=rows.dtype, device=rows.device)
    chunk = CPU_CHUNK if rows.device.type == "cpu" else DEVICE_CHUNK
    width = min(candidates, max(1, chunk // size))
    height = max(1, chunk // (size * width))
    for top in range(0, rows.shape[0], height):
        for left in range(0, candidates, width):
            part = slice(top, top + height), slice(left, left + width)
            s, lo, hi = (t[part].unsqueeze(-1) for t in (step, low, high))  # (r, k, 1)
            x = rows[part[0]].unsqueeze(1)  # (r, 1, N)
            work = (x / s).round_()
            torch.maximum(work, lo, out=work)  # `clamp` with tensor bounds is far slower on a CPU
            torch.minimum(work, hi, out=work).mul_(s)
            errors[part] = powers(work.sub_(x), norm).sum(-1)
    return errors


def search_symmetric(rows: Tensor, bits: int, candidates: int = 80, norm: float = NORM) -> Tensor:
    """Best symmetric step of every row, codes in [-2^(b-1), 2^(b-1) - 1].

    Args:
        rows: (R, N), one row per output channel.
        bits: code width b.
        candidates: number of shrink factors tried, from 1 down to 0.2 of the row's largest magnitude.
        norm: p.

    Returns:
        delta, (R,), positive.

    >>> search_symmetric(torch.tensor([[-8.0, 1.0, 7.0]]), bits=4)
    tensor([1.])
    """
    top = 2 ** (bits - 1)
    # -2^(b-1) and 2^(b-1) - 1 both reach the extremes at factor 1
    limit = torch.maximum(-rows.amin(1) / top, rows.amax(1) / (top - 1 if bits > 1 else 1))
    limit = torch.where(limit > 0, limit, torch.ones_like(limit))
    factors = torch.linspace(1.0, 0.2, candidates, dtype=rows.dtype, device=rows.device)
    step = limit[:, None] * factors  # (R, K)
    low = torch.full_like(step, -top)
    errors = _errors(rows, step, low, -1 - low, norm)
    return step.gather(1, errors.argmin(1, keepdim=True)).squeeze(1)


def search_affine(
    rows: Tensor,
    bits: int,
    candidates: int = 16,
    limits: tuple[Tensor, Tensor] | None = None,
    norm: float = NORM,
) -> tuple[Tensor, Tensor]:
    """Best step and zero point of every row: the upper end shrinks, then the lower, then the upper again.

    Args:
        rows: (R, N), one row per timestep group (or per output channel).
        bits: code width b.
        candidates: shrink factors tried for an end, from 1 down to 0.25. A row without negative values keeps zero
            point 0 and so the whole code range.
        limits: smallest and largest value of each row, each (R,), where `rows` is a subsample of it.
        norm: p.

    Returns:
        (delta, zero_point), each (R,).

    >>> search_affine(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), bits=2)
    (tensor([1.]), tensor([0.]))
    """
    factors = torch.linspace(1.0, 0.25, candidates, dtype=rows.dtype, device=rows.device)
    low, high = (rows.amin(1), rows.amax(1)) if limits is None else limits
    low, high = low.clamp(max=0).unsqueeze(1), high.clamp(min=0).unsqueeze(1)  # (R, 1)

    def best(lows: Tensor, highs: Tensor) -> Tensor:
        step, zero = affine_range(lows, highs, bits)
        return _errors(rows, step, -zero, 2**bits - 1 - zero, norm).argmin(1, keepdim=True)

    def shrink_high(lows: Tensor) -> Tensor:
        return (high * factors).gather(1, best(lows.expand(-1, candidates), high * factors))

    upper = shrink_high(low)
    if bool((low < 0).any()):
        low = (low * factors).gather(1, best(low * factors, upper.expand(-1, candidates)))
        upper = shrink_high(low)
    step, zero = affine_range(low, upper, bits)
    return step.squeeze(1), zero.squeeze(1)


def search_common_zero(
    rows: Tensor,
    bits: int,
    zeros: Tensor,
    candidates: int = 16,
    limits: tuple[Tensor, Tensor] | None = None,
    norm: float = NORM,
) -> tuple[Tensor, Tensor]:
    """One zero point for all rows, and the best step of every row with it.

    Args:
        rows: as in `search_affine`.
        bits: as in `search_affine`.
        zeros: (R,) the rows' own zero points. Five of their quantiles are tried; the one with the least sum of relative
            errors of the rows becomes the common one.
        candidates: shrink factors tried for a row's range, from 1 down to 0.25.
        limits: as in `search_affine`.
        norm: as in `search_affine`.

    Returns:
        (delta, zero_point), each (R,), zero_point the same everywhere.

    >>> search_common_zero(torch.tensor([[-1.0, 2.0], [-2.0, 4.0]]), bits=2, zeros=torch.tensor([1.0, 1.0]))
    (tensor([1., 2.]), tensor([1., 1.]))
    """
    factors = torch.linspace(1.0, 0.25, candidates, dtype=rows.dtype, device=rows.device)
    low, high = (rows.amin(1), rows.amax(1)) if limits is None else limits
    levels = 2**bits - 1
    power = powers(rows.clone(), norm).sum(1).clamp(min=torch.finfo(rows.dtype).tiny)
    tried = torch.quantile(zeros, torch.linspace(0, 1, 5, dtype=zeros.dtype, device=zeros.device)).round()
    found: list[tuple[float, Tensor, Tensor]] = []
    for zero in sorted(set(tried.tolist())):
        below = -low / zero if zero > 0 else torch.zeros_like(low)
        above = high / (levels - zero) if zero < levels else torch.zeros_like(high)
        cover = torch.maximum(below, above)
        step = torch.where(cover > 0, cover, torch.ones_like(cover))[:, None] * factors
        bounds = torch.full_like(step, -zero), torch.full_like(step, levels - zero)
        errors, best = _errors(rows, step, *bounds, norm).min(1)
        common = torch.full_like(zeros, zero)
        found.append((float((errors / power).sum()), step.gather(1, best[:, None]).squeeze(1), common))
    _, delta, common = min(found, key=lambda choice: choice[0])
    return delta, common


def search_log(rows: Tensor, bits: int, taus: tuple[float, ...], candidates: int = 9) -> tuple[Tensor, Tensor]:
    """Best delta and exponent of the logarithmic quantizer for every row.

    Args:
        rows: (R, N), non-negative.
        bits: code width b.
        taus: exponents to try; one for log2 and log-sqrt2, many for AdaLog.
        candidates: values of delta tried, from the row's maximum down to a quarter of it, log-spaced.

    Returns:
        (delta, tau), each (R,).
    """
    top = rows.amax(1).clamp(min=torch.finfo(rows.dtype).tiny * 1e6)
    shrink = torch.exp2(torch.linspace(0, -2, candidates, dtype=rows.dtype, device=rows.device))
    best_error = torch.full_like(top, torch.inf)
    best_delta, best_tau = top.clone(), torch.full_like(top, taus[0])
    for tau in taus:
        exponent = torch.full_like(top, tau)
        for factor in shrink:
            delta = top * factor
            d, t = delta[:, None], exponent[:, None]
            quantized = log_values(log_codes(rows, d, t, bits), d, t, bits)
            error = powers(quantized - rows, NORM).sum(1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_delta = torch.where(better, delta, best_delta)
            best_tau = torch.where(better, exponent, best_tau)
    return best_delta, best_tau
