"""Set a unit's quantizers before anything is learned: TCR's r, DAQ's kinds, ranges, weight grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.probes import capture_inputs
from tcaq_lightning.calibration.streams import UnitData
from tcaq_lightning.config import DAQConfig, TCRConfig
from tcaq_lightning.methods import tcr
from tcaq_lightning.methods.attention_choice import AttentionChoice, set_softmax
from tcaq_lightning.methods.daq import LogHistogram, TailFit
from tcaq_lightning.nn.layers import QuantConv2d, QuantLayer
from tcaq_lightning.nn.parts import quantizers, readers
from tcaq_lightning.nn.state import quantization_state, restore_quantization_state
from tcaq_lightning.quantizers import ActivationQuantizer, SoftmaxQuantizer, TokenQuantizer
from tcaq_lightning.quantizers.activation import along
from tcaq_lightning.quantizers.range_search import (
    NORM,
    search_affine,
    search_common_zero,
    search_symmetric,
)
from tcaq_lightning.quantizers.statistics import RangeStatistics
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups, some_positions
from tcaq_lightning.quantizers.uniform import fake_quantize
from tcaq_lightning.quantizers.weight import column, scale_of_inputs
from tcaq_lightning.runtime.distributed.collectives import broadcast, gather, is_mine, world_size

VALUES = 4096
"""Values per timestep group in the final range search."""
QUICK_VALUES = 1024
"""Values per timestep group while candidates of r are compared."""
QUICK_PLACES = 3000
"""Pixels or tokens that candidates of r are compared on, if half of the probes have as many."""


@dataclass
class Observations:
    """Statistics of one unit over all its calibration inputs, by quantizer name within the unit."""

    ranges: dict[str, RangeStatistics] = field(default_factory=dict)
    histograms: dict[str, LogHistogram] = field(default_factory=dict)
    fits: dict[str, list[TailFit]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Ranges, (G, C) `NAME:low` and `NAME:high`, and histograms, (G, 1 + bins) `NAME:counts` over `edges`."""
        found = {f"{name}:low": ranges.low for name, ranges in self.ranges.items()}
        found |= {f"{name}:high": ranges.high for name, ranges in self.ranges.items()}
        for name, histogram in self.histograms.items():
            found |= {f"{name}:counts": histogram.counts, "edges": histogram.edges}
        return found

    def to_dict(self) -> dict[str, Any]:
        """The fits, JSON-ready."""
        return {"fits": {name: [asdict(fit) for fit in fits] for name, fits in self.fits.items()}}


@dataclass
class Choices:
    """What was set for one unit, for the log and the report.

    Attributes:
        reparameterization: by quantizer, relative output error at r = 1 and at the chosen r.
        attention: by softmax quantizer.
    """

    reparameterization: dict[str, tuple[float, float]] = field(default_factory=dict)
    attention: dict[str, AttentionChoice] = field(default_factory=dict)


@torch.no_grad()
def initialize(
    unit: nn.Module,
    probes: UnitData,
    context: TimestepGroups,
    observed: Observations,
    tcr_config: TCRConfig,
    daq_config: DAQConfig,
    device: torch.device,
    batch_size: int | None = None,
) -> Choices:
    """Set every quantizer of a unit from its quantized-stream inputs.

    The quantizers are dealt to the ranks, which look at the same samples and tell each other what they have set.

    Args:
        unit: quantized unit, its quantizers neutral.
        probes: calibration samples of the unit, the same on every rank, chosen by `probe_indices`.
        context: timestep groups of the denoiser.
        observed: ranges and histograms over all calibration samples.
        tcr_config, daq_config: settings.
        device: where to compute.
        batch_size: samples per pass; None takes all probes at once.
    """
    choices = Choices()
    inputs = capture_inputs(unit, probes, context, device, batch_size)
    layers_of = readers(unit)
    with context.using(probes.groups.to(device)):
        for number, (name, quantizer) in enumerate(quantizers(unit).items()):
            if not is_mine(number):
                continue
            if name not in inputs:  # of a layer that the unit does not use
                for layer in layers_of.get(id(quantizer), []):
                    layer.search_weight()
                continue
            if isinstance(quantizer, SoftmaxQuantizer):
                values = inputs[_sibling(name, "value")]
                choice = set_softmax(quantizer, inputs[name], values, observed.fits[name], daq_config)
                choices.attention[name] = choice
                continue
            layers = layers_of.get(id(quantizer), [])
            ranges = observed.ranges[name]
            if layers and tcr_config.enabled:
                before, after = _set_r(quantizer, layers, inputs[name], ranges, tcr_config)
                choices.reparameterization[name] = before, after
            _set_range(quantizer, inputs[name], ranges)
            for layer in layers:
                layer.set_shift()
                layer.search_weight()
                if layer.output_quantizer is not None:
                    layer.search_output(quantizer(inputs[name]))
    return _exchange(unit, layers_of, choices)


def _exchange(unit: nn.Module, layers_of: dict[int, list[QuantLayer]], choices: Choices) -> Choices:
    """Give every rank what the others have set, and their choices."""
    ranks = world_size()
    if ranks == 1:
        return choices
    for number, quantizer in enumerate(quantizers(unit).values()):
        modules: Sequence[nn.Module] = layers_of.get(id(quantizer)) or [quantizer]
        for module in modules:
            restore_quantization_state(module, broadcast(quantization_state(module), number % ranks))
    everyone = Choices()
    for other in gather(choices):
        everyone.reparameterization |= other.reparameterization
        everyone.attention |= other.attention
    return everyone


def _sibling(name: str, other: str) -> str:
    parent, _, _ = name.rpartition(".")
    return f"{parent}.{other}" if parent else other


def _scaled_by_group(quantizer: ActivationQuantizer, x: Tensor, num_groups: int, values: int) -> Tensor:
    """`values_by_group` of (x - shift) / r, computed for those values alone."""
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


def _set_range(
    quantizer: ActivationQuantizer,
    x: Tensor,
    ranges: RangeStatistics,
    values: int = VALUES,
    candidates: int = 16,
    norm: float = NORM,
) -> None:
    """Search step and zero point of (x - shift) / r for every group, unless they are found at run time."""
    if isinstance(quantizer, TokenQuantizer):
        return
    if quantizer.shift is not None:
        ranges = ranges.shifted(quantizer.shift.cpu())
    low, high = (limit.to(x.device) for limit in ranges.limits(quantizer.r.cpu()))
    rows = _scaled_by_group(quantizer, x, ranges.low.shape[0], values)
    delta, zero = search_affine(rows, quantizer.bits, candidates, (low, high), norm)
    if quantizer.constant_zero and bool((zero != zero[0]).any()):
        delta, zero = search_common_zero(rows, quantizer.bits, zero, candidates, (low, high), norm)
    quantizer.delta.copy_(delta * quantizer.headroom)
    quantizer.zero_point.copy_(zero)


def _set_r(
    quantizer: ActivationQuantizer,
    layers: list[QuantLayer],
    x: Tensor,
    ranges: RangeStatistics,
    config: TCRConfig,
) -> tuple[float, float]:
    """Choose r, and a shift where there may be one, by the layers' output error with both operands quantized.

    Returns:
        The errors of r = 1 without a shift and of the choice, relative to the output's power.
    """
    places = x.numel() // x.shape[quantizer.channel_dim]
    x, groups = _fewer_probes(x, quantizer.groups.current, ranges.low.shape[0], places)
    weights = _weight_magnitude(layers, quantizer.r.numel())
    shifts = [torch.zeros_like(quantizer.r)]
    if config.formula == "profile":
        magnitude = ranges.magnitude().to(x.device)
        grids = [torch.stack([torch.ones_like(quantizer.r), tcr.published_r(magnitude, config.truncation)])]
    else:
        if quantizer.shift is not None:
            shifts.append(ranges.centre().half().to(x))  # the artifact holds float16
        magnitudes = [ranges.shifted(shift.cpu()).magnitude().to(x.device) for shift in shifts]
        grids = [tcr.candidates(magnitude, weights, config.truncation) for magnitude in magnitudes]
    powers = [float(layer.linear_map(x, layer.learned_weight.weight, None).square().sum()) for layer in layers]
    found: list[tuple[float, Tensor, Tensor]] = []
    for shift, grid in zip(shifts, grids, strict=True):
        centred = x - along(shift, x.ndim, quantizer.channel_dim)
        targets = [layer.linear_map(centred, layer.learned_weight.weight, None) for layer in layers]
        for r in grid:
            quantizer.r.copy_(r)
            if quantizer.shift is not None:
                quantizer.shift.copy_(shift)
            _set_range(quantizer, x, ranges, QUICK_VALUES, candidates=8, norm=2)
            with quantizer.groups.using(groups):
                quantized = quantizer(x)
            error = 0.0
            for layer, target in zip(layers, targets, strict=True):
                output = layer.linear_map(quantized, _nearest(layer, r), None)
                error += float(output.sub_(target).square_().sum())
            found.append((error / max(sum(powers), 1e-30), r, shift))
    best = found[1] if config.formula == "profile" else min(found, key=lambda candidate: candidate[0])
    quantizer.r.copy_(best[1])
    if quantizer.shift is not None:
        quantizer.shift.copy_(best[2])
    return found[0][0], best[0]


def _fewer_probes(x: Tensor, groups: Tensor, num_groups: int, places: int) -> tuple[Tensor, Tensor]:
    """Half of each group's probes where those are enough, else all of them, and their timestep groups.

    Args:
        x: (B, ...) one row a probe, sorted by group with equal counts; any other number of rows is kept.
        groups: (B,). num_groups: G. places: pixels or tokens of x.
    """
    each = len(groups) // num_groups
    if len(x) != len(groups) or each == 1 or places < 2 * QUICK_PLACES:
        return x, groups
    chosen = torch.arange(len(groups), device=x.device).view(num_groups, each)[:, ::2].flatten()
    return x[chosen], groups[chosen]


def _nearest(layer: QuantLayer, r: Tensor) -> Tensor:
    """The layer's weight, W r rounded to nearest on a quickly searched symmetric grid, divided by r again."""
    learned = layer.learned_weight
    factor = scale_of_inputs(r, learned.weight, learned.conv_groups)
    scaled = learned.weight * factor
    step = column(search_symmetric(scaled.flatten(1), learned.bits, candidates=12, norm=2), scaled)
    top = 2 ** (learned.bits - 1)
    return fake_quantize(scaled, step, step.new_tensor(-top), step.new_tensor(top - 1)) / factor


def _weight_magnitude(layers: list[QuantLayer], channels: int) -> Tensor:
    """(C,) largest magnitude of the weights that meet each input channel."""
    per_layer = []
    for layer in layers:
        weight = layer.learned_weight.weight  # (O, C / groups, ...)
        conv_groups = layer.groups if isinstance(layer, QuantConv2d) else 1
        blocks = weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs()
        per_layer.append(blocks.view(conv_groups, -1, blocks.shape[1]).amax(1).reshape(channels))
    return torch.stack(per_layer).amax(0)
