from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tcaq_lightning.artifact.structure import describe
from tcaq_lightning.backends.graph.denoiser import GraphDenoiser
from tcaq_lightning.backends.graph.layers import _seen_taps


def test_borders_see_less_of_the_zero_point(frozen: Callable[..., Any]) -> None:
    denoiser = frozen(bits=8, levels=2)
    graph = GraphDenoiser(denoiser, describe(denoiser).boundaries).eval()
    t = torch.tensor([3.0, 30.0, 70.0, 99.0])
    for name in ("conv_in", "down_blocks.0.downsamplers.0.conv"):
        layer, simulated = graph.denoiser.get_submodule(name), denoiser.get_submodule(name)
        channels = simulated.in_channels
        x = torch.randn(4, channels, 8, 8)
        with torch.no_grad():
            graph.times.set(t)
            simulated.input_quantizer.groups.set(simulated.input_quantizer.groups.of(t))
            assert torch.allclose(layer(x), simulated(x), rtol=1e-4, atol=1e-4)


def test_taps_of_a_strided_convolution() -> None:
    for size, before, after, kernel, stride, dilation in [(8, 1, 1, 3, 2, 1), (7, 0, 1, 3, 2, 1), (9, 2, 2, 3, 1, 2)]:
        ones = torch.nn.functional.pad(torch.ones(1, 1, size), (before, after))
        windows = ones.unfold(2, dilation * (kernel - 1) + 1, stride)[0, 0, :, ::dilation]
        assert _seen_taps(size, before, after, kernel, stride, dilation).tolist() == windows.long().tolist()
