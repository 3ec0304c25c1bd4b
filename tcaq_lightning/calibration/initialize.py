"""Set a unit's quantizers before anything is learned: r and shift, ranges, weight grids, kinds of softmax quantizers.

`methods/` decides what each of these is set to; this module decides the order, and which rank sets which quantizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.probes import capture_inputs
from tcaq_lightning.calibration.unit_data import UnitData
from tcaq_lightning.config import DAQConfig, TCRConfig
from tcaq_lightning.methods.daq import AttentionChoice, LogHistogram, TailFit, choose_softmax
from tcaq_lightning.methods.reparameterization import Reparameterization, choose, named
from tcaq_lightning.nn.layers import QuantLayer
from tcaq_lightning.nn.parts import quantizers, readers
from tcaq_lightning.nn.state import quantization_state, restore_quantization_state
from tcaq_lightning.quantizers import ActivationQuantizer
from tcaq_lightning.quantizers.observers import RangeStatistics
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.distributed.collectives import broadcast, gather, is_mine, world_size


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
    timestep_groups: TimestepGroups,
    observed: Observations,
    tcr_config: TCRConfig,
    daq_config: DAQConfig,
    device: torch.device,
    batch_size: int | None = None,
    queries: int = 256,
) -> Choices:
    """Set every quantizer of a unit from its quantized-stream inputs.

    The quantizers are dealt to the ranks, which look at the same samples and tell each other what they have set.

    Args:
        unit: quantized unit, its quantizers neutral.
        probes: calibration samples of the unit, the same on every rank, chosen by `probe_indices`.
        timestep_groups: those of the denoiser.
        observed: ranges and histograms over all calibration samples.
        tcr_config: which reparameterizations are tried, if any.
        daq_config: how softmax quantizers are chosen.
        device: where to compute.
        batch_size: samples per pass; None takes all probes at once.
        queries: of each attention head, whose probabilities are looked at.

    Raises:
        UserError: `tcr.formula` names a reparameterization that is not registered.
    """
    choices = Choices()
    members = named(tcr_config) if tcr_config.enabled else {}
    inputs = capture_inputs(unit, probes, timestep_groups, device, batch_size, queries)
    layers_of = readers(unit)
    with timestep_groups.using(probes.groups.to(device)):
        for number, (name, quantizer) in enumerate(quantizers(unit).items()):
            if not is_mine(number):
                continue
            layers = layers_of.get(id(quantizer), [])
            if name not in inputs:  # of a layer that the unit does not use
                for layer in layers:
                    layer.search_weight()
            elif quantizer.place == "probabilities":
                values = inputs[_sibling(name, "value")]
                choice = choose_softmax(quantizer, inputs[name], values, observed.fits[name], daq_config)
                choices.attention[name] = choice
            else:
                errors = _set_activation(quantizer, layers, inputs[name], observed.ranges[name], members)
                if errors is not None:
                    choices.reparameterization[name] = errors
    return _exchange(unit, layers_of, choices)


def _set_activation(
    quantizer: ActivationQuantizer,
    layers: Sequence[QuantLayer],
    x: Tensor,
    ranges: RangeStatistics,
    members: dict[str, Reparameterization],
) -> tuple[float, float] | None:
    """Set the quantizer of an input, then what depends on it: the grids of the weights and the ranges of the outputs.

    Args:
        quantizer: of the input.
        layers: those that read it; none read q, k and v.
        x: (B, ...) probes in full precision.
        ranges: of the input's channels.
        members: reparameterizations that are tried.

    Returns:
        What `choose` returns; None without a reparameterization.
    """
    errors = choose(quantizer, layers, x, ranges, members) if layers and members else None
    quantizer.search(x, ranges)
    for layer in layers:
        layer.set_shift()
        layer.search_weight()
        if layer.output_quantizer is not None:
            layer.search_output(quantizer(x))
    return errors


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
