"""Ranges of activations: step and zero point of every timestep group, from statistics and probes.

The statistics give the widest range worth trying, the probes tell which narrower one loses least: candidates are
compared by sum |x - x^|^p over the probes' values (docs/method.md, "Quantizers").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tcaq_lightning.quantizers import ActivationQuantizer, TokenQuantizer
from tcaq_lightning.quantizers.range_search import NORM, search_affine, search_common_zero
from tcaq_lightning.quantizers.statistics import RangeStatistics
from tcaq_lightning.quantizers.timestep_groups import some_positions

VALUES = 4096
"""Values per timestep group in the search."""


def set_range(
    quantizer: ActivationQuantizer,
    x: Tensor,
    ranges: RangeStatistics,
    values: int = VALUES,
    candidates: int = 16,
    norm: float = NORM,
) -> None:
    """Search step and zero point of (x - shift) / r for every group, unless they are found at run time.

    Args:
        quantizer: whose `delta` (G,) and `zero_point` (G,) are set; its `r`, `shift` and `headroom` hold already.
        x: (B, ...) probes, sorted by group with equal counts; or any number of rows that all groups share evenly.
        ranges: of each channel of x in each group, over all samples.
        values: of each group that the candidates are compared on.
        candidates: shrink factors that are tried.
        norm: p.
    """
    if isinstance(quantizer, TokenQuantizer):
        return
    if quantizer.shift is not None:
        ranges = ranges.shifted(quantizer.shift.cpu())
    low, high = (limit.to(x.device) for limit in ranges.limits(quantizer.r.cpu()))
    rows = scaled_by_group(quantizer, x, ranges.low.shape[0], values)
    delta, zero = search_affine(rows, quantizer.bits, candidates, (low, high), norm)
    if quantizer.constant_zero and bool((zero != zero[0]).any()):
        delta, zero = search_common_zero(rows, quantizer.bits, zero, candidates, (low, high), norm)
    quantizer.delta.copy_(delta * quantizer.headroom)
    quantizer.zero_point.copy_(zero)


def scaled_by_group(quantizer: ActivationQuantizer, x: Tensor, num_groups: int, values: int) -> Tensor:
    """Some values of (x - shift) / r of each group, computed for those values alone.

    Args:
        quantizer: whose `r` and `shift` are taken.
        x: (B, ...) probes, sorted by group with equal counts.
        num_groups: G.
        values: of each group, at most.

    Returns:
        (G, n), as `values_by_group` picks them.
    """
    rows = x.reshape(num_groups, -1)
    positions = some_positions(rows.shape[1], values)
    count, rows = rows.shape[1], rows[:, positions]
    if quantizer.shift is None and quantizer.r.numel() == 1:
        return rows
    numbers = torch.arange(num_groups)[:, None] * count  # of the values in all of x
    numbers = numbers + (torch.arange(count) if isinstance(positions, slice) else positions)
    inner = math.prod(x.shape[quantizer.channel_dim % x.ndim + 1 :])
    channels = (numbers // inner % quantizer.r.numel()).to(x.device)
    if quantizer.shift is not None:
        rows = rows - quantizer.shift[channels]
    return rows / quantizer.r[channels]
