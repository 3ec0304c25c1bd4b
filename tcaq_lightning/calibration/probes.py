"""Samples for searches: which ones, and the inputs of a unit's quantizers on them."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.unit_data import UnitData
from tcaq_lightning.nn.parts import quantizers
from tcaq_lightning.nn.state import full_precision
from tcaq_lightning.quantizers import Quantizer
from tcaq_lightning.quantizers.activation import widened
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups


def probe_indices(groups: Tensor, num_groups: int, total: int) -> Tensor:
    """Samples spread evenly over the groups, the same number in each, sorted by group.

    Args:
        groups: (N,) timestep group of each sample; none of them is empty.
        num_groups: G.
        total: approximate number of samples; each group gives at least one and at most the size of the smallest group.

    Returns:
        (G n,) indices of samples, those of a group in sequence.

    >>> probe_indices(torch.tensor([1, 0, 0, 1, 1]), num_groups=2, total=4)
    tensor([1, 2, 0, 3])
    """
    smallest = int(torch.bincount(groups, minlength=num_groups).min())
    each = min(max(1, total // num_groups), smallest)
    order = torch.argsort(groups, stable=True)
    starts = torch.searchsorted(groups[order], torch.arange(num_groups))
    size = torch.bincount(groups, minlength=num_groups)
    offsets = (torch.arange(each)[None, :] * size[:, None]) // each  # spread within the group
    return order[(starts[:, None] + offsets).flatten()]


def capture_inputs(
    unit: nn.Module,
    probes: UnitData,
    timestep_groups: TimestepGroups,
    device: torch.device,
    batch_size: int | None = None,
    queries: int = 256,
) -> dict[str, Tensor]:
    """Inputs of every quantizer while the unit runs in full precision, none narrower than float32.

    Args:
        unit: quantized unit.
        probes: samples of it.
        timestep_groups: those of the denoiser.
        device: where to compute.
        batch_size: samples in one pass; None takes all of them.
        queries: number of queries that are kept of probabilities (B, heads, T, S), the one with the largest value among
            them.
    """
    captured: dict[str, list[Tensor]] = defaultdict(list)
    passed: dict[str, Tensor] = {}

    def hook(name: str, quantizer: Quantizer) -> Any:
        of_probabilities = quantizer.place == "probabilities"

        def receive(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = widened(args[0])  # of several calls in a pass the last one is kept
            passed[name] = _some_queries(x, queries) if of_probabilities else x

        return receive

    handles = [q.register_forward_pre_hook(hook(n, q)) for n, q in quantizers(unit).items()]
    batches = torch.arange(len(probes)).tensor_split(1 if batch_size is None else math.ceil(len(probes) / batch_size))
    try:
        with full_precision(unit):
            for batch in batches:
                probes.run(unit, timestep_groups, batch, device)
                for name in list(passed):
                    captured[name].append(passed.pop(name))
    finally:
        for handle in handles:
            handle.remove()
    shared = {name for name, parts in captured.items() if parts[0].shape[0] == 1 < len(batches[0])}
    # a single row is every sample's
    return {name: parts[0] if name in shared else _joined(parts) for name, parts in captured.items()}


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts as one tensor; each is freed when it has been copied."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(sum(len(x) for x in parts), *parts[0].shape[1:])
    start = len(whole)
    while parts:
        part = parts.pop()
        start -= len(part)
        whole[start : start + len(part)] = part
    return whole


def _some_queries(probabilities: Tensor, count: int) -> Tensor:
    """`count` of each sample's T queries from (B, heads, T, S): the one with the largest value, and others at random.

    >>> _some_queries(torch.zeros(1, 2, 40, 3), 10).shape
    torch.Size([1, 2, 10, 3])
    """
    samples, _, queries, _ = probabilities.shape
    if queries <= count:
        return probabilities
    drawn = torch.randperm(queries, generator=torch.Generator().manual_seed(queries))[: count - 1]
    largest = probabilities.amax((1, 3)).argmax(1, keepdim=True)  # (B, 1)
    kept = torch.cat([drawn.to(largest.device).expand(samples, -1), largest], dim=1)
    return probabilities.take_along_dim(kept[:, None, :, None], dim=2)
