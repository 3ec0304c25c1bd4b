"""A small UNet with its quantized twin, and units of it with their quantizers set."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from tcaq_lightning.calibration.initialize import Choices, Observations, initialize
from tcaq_lightning.calibration.observation import observing
from tcaq_lightning.calibration.probes import probe_indices
from tcaq_lightning.calibration.storage import ActivationStorage
from tcaq_lightning.calibration.streams import Streams
from tcaq_lightning.calibration.unit_data import UnitData
from tcaq_lightning.config import ActivationConfig, DAQConfig, QuantizationConfig, TCRConfig, WeightConfig
from tcaq_lightning.models.denoiser_calls import Samples
from tcaq_lightning.models.graph import UnitGraph, trace_units
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.nn.state import full_precision
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups

CPU = torch.device("cpu")


def make_unet(size: int = 8, channels: tuple[int, int] = (8, 16), head_dim: int = 8, attention: bool = True) -> Any:
    """A small deterministic UNet, frozen."""
    down, up = ("AttnDownBlock2D", "AttnUpBlock2D") if attention else ("DownBlock2D", "UpBlock2D")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=size,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", down),
            up_block_types=(up, "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=head_dim,
        )
        for p in unet.parameters():  # biases and norms are trivial at first
            p.data += 0.02 * torch.randn_like(p)
    return unet.requires_grad_(False).eval()


@dataclass
class Twins:
    """A UNet, its quantized twin, and calibration samples for both."""

    full: Any
    quantized: Any
    graph: UnitGraph
    timestep_groups: TimestepGroups
    rows: list[Any]
    x: Tensor
    timesteps: Tensor
    storage: ActivationStorage | None = None

    def streams(self, batch_size: int = 4) -> Streams:
        storage = self.storage or ActivationStorage({"device": 0, "host": 1e9, "disk": 0}, CPU, Path())
        samples = Samples(self.x, self.timesteps)
        return Streams(self.full, self.quantized, self.graph, self.timestep_groups, samples, batch_size, storage)

    def data_of(self, name: str) -> UnitData:
        """The unit's inputs when all units before it are in full precision."""
        streams = self.streams(batch_size=len(self.x))
        with full_precision(self.quantized):
            for position, unit in enumerate(self.graph.names):
                data = streams.load(position)
                if unit == name:
                    return data
                streams.store(position, data)
        raise KeyError(name)

    def unit(self, name: str) -> nn.Module:
        module: nn.Module = self.quantized.get_submodule(name)
        return module


def make_twins(config: QuantizationConfig | None = None, samples: int = 10, **kwargs: Any) -> Twins:
    """`Twins` with neutral quantizers; weights are set to nearest rounding."""
    config = config or QuantizationConfig(weight=WeightConfig(bits=4), activation=ActivationConfig(bits=6))
    full = make_unet(**kwargs)
    quantized, timestep_groups = copy.deepcopy(full), TimestepGroups([500.0])
    rows = quantize(quantized, config, timestep_groups)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 1, full.config.sample_size, full.config.sample_size, generator=generator)
    timesteps = torch.linspace(0, 999, samples).round().long()
    graph = trace_units(full, lambda: full(x[:2], timesteps[:2]))
    return Twins(full, quantized, graph, timestep_groups, rows, x, timesteps)


def observe(unit: nn.Module, data: UnitData, timestep_groups: TimestepGroups) -> Observations:
    """Ranges, histograms and fits of a unit over all its data."""
    with torch.no_grad(), observing(unit, timestep_groups) as observed:
        data.run(unit, timestep_groups, torch.arange(len(data)), CPU)
    return observed


def initialized(
    twins: Twins, name: str, tcr: TCRConfig | None = None, daq: DAQConfig | None = None
) -> tuple[nn.Module, UnitData, Choices]:
    """Sets a unit's quantizers from all its data: (twins, name, tcr, daq)."""
    unit, data, timestep_groups = twins.unit(name), twins.data_of(name), twins.timestep_groups
    probes = data.select(probe_indices(data.groups, timestep_groups.num_groups, 40))
    settings = observe(unit, data, timestep_groups), tcr or TCRConfig(), daq or DAQConfig(), CPU
    choices = initialize(unit, probes, timestep_groups, *settings)
    return unit, data, choices
