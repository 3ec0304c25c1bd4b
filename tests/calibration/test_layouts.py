"""Denoisers whose tensors are laid out in other ways than images and tokens: frames, sequences, folded rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tcaq_lightning.calibration.planning.footprint import unit_samples
from tcaq_lightning.calibration.storage import ActivationStorage
from tcaq_lightning.calibration.streams import Streams
from tcaq_lightning.models.denoiser_calls import Samples
from tcaq_lightning.models.graph import trace_units
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.nn.state import full_precision
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tests.families import W4A8

SAMPLES = 5


class Block(nn.Module):
    """Returns what it is given, in its own layout."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        y: Tensor = x + self.proj(x)
        return y if context is None else y + context


class Video(nn.Module):
    """Frames (B, C, F, H, W), attended to in space and in time, and a layer that is used twice."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.time = nn.Conv3d(2, 4, (1, 2, 2), stride=(1, 2, 2)), nn.Linear(1, 4)
        self.space, self.frames, self.out = Block(), Block(), nn.ConvTranspose3d(4, 2, (1, 2, 2), stride=(1, 2, 2))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        x = self.embed(sample)  # (B, C, F, H, W)
        b, c, f, h, w = x.shape
        t = self.time(timestep[:, None] / 1000.0) + self.time(timestep[:, None] / 500.0)
        tokens = x.permute(0, 2, 3, 4, 1).reshape(b * f, h * w, c)
        tokens = self.space(tokens, t.repeat_interleave(f, 0)[:, None])
        tokens = tokens.reshape(b, f, h * w, c).transpose(1, 2).reshape(b * h * w, f, c)
        tokens = self.frames(tokens)
        x = tokens.reshape(b, h, w, f, c).permute(0, 4, 3, 1, 2)
        return (self.out(x),)


class Sound(nn.Module):
    """Sequences (B, C, L), channels first, and tokens of two axes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.grid = nn.Conv1d(2, 4, 3, padding=1), nn.Linear(4, 4)
        self.out = nn.ConvTranspose1d(4, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        x = self.embed(sample) + timestep[:, None, None] / 1000
        x = x + self.grid(x.unflatten(2, (2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).flatten(2)
        return (self.out(x),)


MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {"video": (Video, (2, 3, 4, 6)), "sound": (Sound, (2, 8))}


@pytest.mark.parametrize("name", MODELS)
def test_streams_give_what_plain_forward_passes_do(name: str) -> None:
    kind, shape = MODELS[name]
    full: nn.Module = kind().requires_grad_(False).eval()
    quantized, groups = copy.deepcopy(full), TimestepGroups([500.0])
    quantize(quantized, W4A8, groups)
    samples = Samples(torch.randn(SAMPLES, *shape), torch.tensor([0, 900, 100, 800, 300]))
    graph = trace_units(full, lambda: samples[:2].predict(full))
    outputs: dict[str, Tensor] = {}

    def keep(unit: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            outputs.setdefault(unit, output)

        return hook

    for unit in graph.names:
        full.get_submodule(unit).register_forward_hook(keep(unit))
    samples.predict(full)
    storage = ActivationStorage({"device": 0, "host": 1e9, "disk": 0}, torch.device("cpu"), Path())
    streams = Streams(full, quantized, graph, groups, samples, 3, storage)
    with full_precision(quantized):
        for position, unit in enumerate(graph.names):
            data = streams.load(position)
            expected = outputs[unit]
            torch.testing.assert_close(graph.returned(unit, data.targets), expected)
            channel = 1 if isinstance(full.get_submodule(unit), nn.modules.conv._ConvNd) else -1
            assert data.channels == expected.shape[channel]
            got = data.run(quantized.get_submodule(unit), groups, torch.arange(SAMPLES), torch.device("cpu"))
            torch.testing.assert_close(got, data.targets, rtol=1e-4, atol=1e-5)
            streams.store(position, data)


def test_planning_keeps_outputs_as_streams_do() -> None:
    full = Video().requires_grad_(False).eval()
    samples = Samples(torch.randn(2, 2, 3, 4, 6), torch.tensor([0, 900]))
    graph = trace_units(full, lambda: samples.predict(full))
    found = unit_samples(full, graph, samples)
    assert {name: tuple(found[name].targets.shape[1:]) for name in graph.names} == graph.output_shapes
    assert graph.output_shapes["space"] == (18, 4)
    assert graph.output_shapes["embed"] == (4, 6, 3)
